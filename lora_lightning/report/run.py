"""The page of a run, from what it left in its folder alone; and of a run of several adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lora_lightning.report.curves import curves
from lora_lightning.report.head import adapted, duration, head, methods, title_of
from lora_lightning.report.layers import layers
from lora_lightning.report.left import LeftRun, read_run
from lora_lightning.report.page import PAGE_FILE, Html, Section, table, text, write_page

NO_CURVES = (
    "No metrics were kept, so that there are no curves: every logger but logger=none keeps csv/metrics.csv."
)


def write(folder: str | Path, path: Path | None = None) -> Path:
    """Make report.html of a run's folder anew, also of a run that has not ended.

    Args:
        path: another file than the folder's own report.html.

    Returns:
        The file.

    Raises:
        UserError: the folder is no run's, or a file in it is damaged.
    """
    run = read_run(Path(folder))
    path = path or run.folder / PAGE_FILE
    write_page(path, title_of(run), sections_of(run, path.parent), head(run))
    return path


def sections_of(run: LeftRun, beside: Path) -> list[Section]:
    """Everything under the head: first the results, then the task's own, then how training went.

    Args:
        beside: the folder of the page, for links.
    """
    if run.adapters:
        found, *drawn = _adapters(run, beside)
        return [found, *run.sections, *drawn]
    labels = run.labels()
    metrics = {labels[method]: found for method, found in run.metrics.items()}
    drawn = curves(metrics, run.scores)
    nothing = [Section("Curves", f'<p class="soft">{text(NO_CURVES, 500)}</p>')]
    trains = run.method != "none"
    return [
        *methods(run),
        *run.sections,
        *(drawn or nothing * trains),
        *layers(run.updates, run.metrics.get(run.method, {})),
        *adapted(run),
    ]


def _adapters(run: LeftRun, beside: Path) -> list[Section]:
    """The runs of several adapters: a row each with a link to its page, and their curves over each other."""
    found = {n: read_run(folder) for n, folder in run.adapters.items() if (folder / "config.yaml").is_file()}
    rows = []
    for name in run.adapters:
        one = found.get(name)
        if one is None or not one.ended:
            rows.append([name, *["–"] * 4, "not begun" if one is None else "has not ended"])
            continue
        link = quote(str((one.folder / PAGE_FILE).relative_to(beside))) if _within(one.folder, beside) else ""
        shown = Html(f'<a href="{link}">{text(name)}</a>') if link else name
        scores = [state(one, result) for result in (one.before, one.result)]
        trained = f"{one.result.get('trained', 0):,}"
        rows.append([shown, *scores, trained, seconds_of(one), ""])
    first = next((one for one in found.values() if one.main), None)
    label = first.main.label if first and first.main else "score"
    header = ("adapter", f"test {label}, before", "after", "trained parameters", "time", "")
    lines = {name: one.metrics[one.method] for name, one in found.items() if one.method in one.metrics}
    return [Section("Adapters", table(header, rows)), *curves(lines, first.scores if first else [])]


def _within(folder: Path, beside: Path) -> bool:
    return folder.absolute().is_relative_to(beside.absolute()) and folder.is_relative_to(beside)


def state(run: LeftRun, result: Mapping[str, Any]) -> str:
    """The score that counts most of a result, with its interval."""
    if run.main is None or not result:
        return "–"
    value = result["scores"].get(run.main.name)
    bounds = run.main.interval(result["intervals"].get(run.main.name))
    return run.main.number(value) + (f" ({bounds})" if bounds else "")


def seconds_of(run: LeftRun) -> str:
    """The time of training, in words."""
    seconds = run.result.get("seconds")
    return "–" if seconds is None else duration(seconds)
