"""Several runs on one page: how they differ in their options, scores, curves and effective ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.errors import UserError
from lora_lightning.report.curves import curves
from lora_lightning.report.head import title_of
from lora_lightning.report.layers import compared_ranks
from lora_lightning.report.left import LeftRun, read_run
from lora_lightning.report.page import Section, table, text, write_page
from lora_lightning.report.run import seconds_of

OF_THE_PLACE = (
    "run_dir",
    "ckpt_path",
    "logger",
    "callbacks",
)  # options that differ from run to run by themselves


def write_together(folders: Sequence[Path], path: Path) -> None:
    """A page that sets runs side by side; of a run of several adapters each is one.

    Raises:
        UserError: a folder is no run's, or a file in it is damaged; or it is the same run twice.
    """
    runs = [one for folder in folders for one in _each(read_run(folder))]
    places = [run.folder.resolve() for run in runs]
    if twice := next((run.folder for i, run in enumerate(runs) if places[i] in places[:i]), None):
        raise UserError(f"{twice}: is given twice. Give runs that differ.")
    named = dict(zip(_names([run.folder for run in runs]), runs, strict=True))
    lines = {name: run.metrics[run.method] for name, run in named.items() if run.method in run.metrics}
    sections = [
        _scores(named),
        _options(named),
        *curves(lines, next((run.scores for run in runs if run.scores), [])),
        *compared_ranks({name: run.updates for name, run in named.items()}),
    ]
    lead = "".join(f"<p><b>{text(name)}</b>: {text(_sentence(run), 500)}</p>" for name, run in named.items())
    write_page(path, f"{len(named)} runs side by side", sections, lead)


def _each(run: LeftRun) -> list[LeftRun]:
    begun = [folder for folder in run.adapters.values() if (folder / "config.yaml").is_file()]
    return [read_run(folder) for folder in begun] if begun else [run]


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder by as much of its path as tells it from the others."""
    paths = [folder.resolve() for folder in folders]
    if len({p.name for p in paths}) == len(paths):
        return [p.name for p in paths]
    common = Path(os.path.commonpath(paths))
    return [str(p.relative_to(common)) if p != common else p.name for p in paths]


def _sentence(run: LeftRun) -> str:
    return f"{title_of(run)}{'' if run.ended else ' (has not ended)'}"


def _scores(runs: Mapping[str, LeftRun]) -> Section:
    """A row a run: every score that one of them has, with its interval, and what it cost."""
    scores = {
        s.name: s for run in runs.values() for s in run.scores if s.name in run.result.get("scores", {})
    }
    rows = []
    for name, run in runs.items():
        values, bounds = run.result.get("scores", {}), run.result.get("intervals", {})
        cells = []
        for key, score in scores.items():
            interval = score.interval(bounds.get(key))
            cells.append(score.number(values.get(key)) + (f" ({interval})" if interval else ""))
        trained = run.result.get("trained")
        cost = [f"{trained:,}" if trained is not None else "–", seconds_of(run)]
        rows.append([name, run.labels()[run.method], *cells, *cost])
    header = ("run", "method", *(s.label for s in scores.values()), "trained parameters", "time")
    return Section("Scores on the test data", table(header, rows, left=2))


def _options(runs: Mapping[str, LeftRun]) -> Section:
    """The options in which they differ."""
    flat = {name: dict(_flat(run.config)) for name, run in runs.items()}
    every = dict.fromkeys(key for options in flat.values() for key in options)
    rows = []
    for key in every:
        values = [flat[name].get(key, "–") for name in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    html = table(("option", *runs), rows) if rows else "<p>All options are the same.</p>"
    return Section("Options that differ", html)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in config.items():
        if not prefix and name in OF_THE_PLACE:
            continue
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append(
                (f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str))
            )
    return found
