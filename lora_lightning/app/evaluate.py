"""`lora-lightning evaluate`: what a trained model scores on its own test data, or on others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lora_lightning.adapters.manage import adapters_off
from lora_lightning.adapters.state import is_injected
from lora_lightning.app.evaluation_data import data_or_problems
from lora_lightning.app.prediction_files import problems_of_file
from lora_lightning.app.progress import Progress
from lora_lightning.app.rebuild import build, builder_of
from lora_lightning.app.signatures import takes
from lora_lightning.app.trained import Trained, named
from lora_lightning.data.coco import GAP
from lora_lightning.data.relabelled import Relabelled, by_name
from lora_lightning.errors import UserError
from lora_lightning.files.allowed import section_of
from lora_lightning.files.locate import RUN_FILE
from lora_lightning.report.page import PAGE_FILE, Section, left, table, write_page
from lora_lightning.tasks.reporting import AFTER, BASE, Reporting
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.tables import format_table, printable

DATA = ("data=", "data.", "data/")  # words about the data
NO_VALUE = "–"  # such as the precision of a class that is never taken for
BOUNDS = ("_low", "_high")  # of an interval, at the ends of a column's name
CLASSES = 40  # of which the page has a row each
PER_CLASS = "test/map/"  # how detection logs the score of a class


def evaluate(options: Mapping[str, Any], words: Sequence[str]) -> str:
    """Test what was trained.

    Args:
        options: of the command `evaluate`, by name.
        words: `data=NAME data.key=value …` for other data than those of the run; `recipe=NAME …` where no
            run says how the model is built.

    Returns:
        A page: every score, with its interval where the task has them, and those of each class.

    Raises:
        UserError: every mistake in one message, before the model is built; or the data have classes that
            the model does not.
    """
    problems: list[str] = []
    if "out" in options:
        overwrite = bool(options.get("overwrite"))
        problems += problems_of_file("out", Path(options["out"]).expanduser(), (".json",), overwrite)
    folder = Path(options["report"]).expanduser() if "report" in options else None
    if folder and (folder / RUN_FILE).is_file():
        problems.append(f"report={folder}: is a run's folder, which has a page of its own; give another.")
    of_recipe = any(word.startswith("recipe=") for word in words)
    about_data = [word for word in words if word.startswith(DATA) and not of_recipe]
    trained = named(options, [word for word in words if word not in about_data], problems)
    data = None
    if trained:
        data = data_or_problems(trained, about_data, problems)
    if problems or trained is None or data is None:
        raise UserError("\n".join(dict.fromkeys(problems)))
    task, test = tester(trained, data, bool(options.get("check_base", True)), pictured=folder is not None)
    found = _found(task, test())
    lines = [_title(trained, data), "", _page(task, found)]
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        told = task.report(data, folder) if hasattr(task, "report") else []
        lines += ["", *told, f"{_write_report(folder, _title(trained, data), task, found)}: the page of it"]
    if "out" in options:
        out = Path(options["out"]).expanduser()
        text = json.dumps({**_origin(trained), **found}, indent=1, ensure_ascii=False) + "\n"
        write_whole(out, lambda file: Path(file).write_text(text, encoding="utf-8"))
        lines += ["", f"{out}: all of it, for programs"]
    return printable("\n".join(lines))


def _write_report(folder: Path, title: str, task: Any, found: Mapping[str, Any]) -> Path:
    """The page of a test: its scores, and what the task has left."""
    scores = Section("Scores on the test data", table(("score", ""), _score_rows(task, found)))
    write_page(folder / PAGE_FILE, title, [scores, *left(folder)[1]])
    return folder / PAGE_FILE


def tester(
    trained: Trained, data: L.LightningDataModule, check_base: bool, pictured: bool
) -> tuple[Any, Callable[[], dict[str, float]]]:
    """The task around what was trained, and what tests it and gives all that it has logged.

    Args:
        pictured: whether a page is made of it, which shows what was before the adapter, too.

    Raises:
        UserError: the data have classes that the model does not.
    """
    if trained.facts is None:  # a base alone, which is as its data are
        trained = Trained(trained.source, trained.config, trained.own, dict(getattr(data, "provides", {})))
    _match(data, trained.facts or {})
    model, facts = trained.model(check_base, merged=not pictured)
    task = _task(trained, model, facts)
    if "temperature" in facts and hasattr(task, "temperature"):
        task.temperature = facts["temperature"]
    if isinstance(task, Reporting):
        task.pictured = pictured
        task.now = AFTER if trained.source else BASE
        task.off = partial(adapters_off, model) if is_injected(model) else None
    trainer = trained.config.get("trainer") or {}
    fabric = trained.fabric()
    runs: Any = L.Trainer(
        accelerator=trainer.get("accelerator", "auto"),
        devices=1,
        precision=fabric._precision.precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Progress("")],
        use_distributed_sampler=False,
    )
    return task, lambda: dict(runs.test(task, datamodule=data, verbose=False)[0])


def _task(trained: Trained, model: Any, facts: Mapping[str, Any]) -> Any:
    config = trained.config["task"]
    given = {name: value for name, value in facts.items() if takes(config["_target_"], name)}
    if trained.own:
        return instantiate(OmegaConf.create(dict(config)), model=model, **given, _convert_="all")
    target, options = section_of(trained.config, "task", trained.where)
    builder_of(target)
    return build(target, {**options, **given, "model": model})


def _match(data: Any, facts: Mapping[str, Any]) -> None:
    """Let the data's targets be numbered as the model numbers its classes, by their names."""
    theirs = list(getattr(data, "provides", {}).get("class_names") or ())
    own = list(facts.get("class_names") or ())
    if not theirs or not own or theirs == own:
        return
    numbers, loader = by_name(theirs, own, (GAP,)), data.test_dataloader
    data.test_dataloader = lambda: Relabelled(loader(), numbers, len(own))


def _found(task: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Scores, intervals, and what there is of each class, for programs."""
    scores = {name.removeprefix("test/"): value for name, value in metrics.items()}
    found: dict[str, Any] = {"scores": scores}
    if hasattr(task, "intervals") and (intervals := task.intervals()):
        found["intervals"] = {name: list(bounds) for name, bounds in intervals.items()}
    header, rows = _per_class(task, metrics)
    if rows:
        found["per_class"] = [dict(zip(header, row, strict=True)) for row in rows]
    return found


def _per_class(task: Any, metrics: Mapping[str, float]) -> tuple[list[str], list[list[Any]]]:
    tables = task.tables() if hasattr(task, "tables") else {}
    if "per_class" in tables:
        header, rows = tables["per_class"]
        return list(header), [list(row) for row in rows]
    rows = [[name.removeprefix(PER_CLASS), v] for name, v in metrics.items() if name.startswith(PER_CLASS)]
    return ["class", "mAP"], rows


def score_rows(task: Any, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The label and the value of every score of a test that was just made."""
    return _score_rows(task, _found(task, metrics))


def _score_rows(task: Any, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    scores, intervals = found["scores"], found.get("intervals", {})
    return [
        (score.label, score.show(scores[score.name], intervals.get(score.name)))
        for score in task.scores
        if score.name in scores
    ]


def _page(task: Any, found: Mapping[str, Any]) -> str:
    parts = [format_table(("score", "on the test data"), _score_rows(task, found))]
    if classes := found.get("per_class"):
        shown = [_cells(row) for row in classes[:CLASSES]]
        parts.append(format_table(list(shown[0]), [list(row.values()) for row in shown]))
        if len(classes) > CLASSES:
            parts.append(f"and {len(classes) - CLASSES} classes more, which out=FILE.json has.")
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Of a class, each number with its interval in one cell."""
    shown = {}
    for name, value in row.items():
        if name.endswith(BOUNDS):
            continue
        bounds = [row.get(f"{name}{end}") for end in BOUNDS]
        interval = "" if None in bounds else f" ({bounds[0]:.3f}–{bounds[1]:.3f})"
        plain = NO_VALUE if value is None else str(value)
        shown[name] = f"{value:.3f}{interval}" if isinstance(value, float) else plain
    return shown


def _title(trained: Trained, data: Any) -> str:
    what = trained.source.path if trained.source else "the base alone"
    count = len(data.test_set) if hasattr(data, "test_set") else None
    return f"{what} on {type(data).__name__}{f', {count:,} test samples' if count else ''}"


def _origin(trained: Trained) -> dict[str, Any]:
    source = trained.source
    return {"evaluated": str(source.path) if source else None, "recipe": source.recipe() if source else None}
