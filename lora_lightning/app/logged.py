"""What the trackers are told when a run has ended: tables, examples, the adapter, the final numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lora_lightning.app.loggers import Loggers
from lora_lightning.app.results import Result, results_rows
from lora_lightning.app.run import Run
from lora_lightning.app.upload import upload_of
from lora_lightning.app.wandb_artifact import artifact_name, log_adapter
from lora_lightning.files.locate import ADAPTER, read_source
from lora_lightning.tasks.scores import Score
from lora_lightning.trainer.trackers.choice import most_examples, tracker_of
from lora_lightning.trainer.trackers.tracker import sparing

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # header and rows


@rank_zero_only
def log_end(loggers: Loggers, run: Run, results: Sequence[Result]) -> None:
    """Tell every logger what its kind takes.

    Args:
        run: whose task holds what was tested.
        results: of its method and of those that it was compared with.
    """
    tables: dict[str, Table] = {"results": results_rows(results, run.task.scores)}
    tables |= run.task.tables() if hasattr(run.task, "tables") else {}
    most = most_examples(loggers.all())
    examples = run.task.examples(run.data, most) if most and hasattr(run.task, "examples") else ()
    confusion = run.task.confusion() if hasattr(run.task, "confusion") else None
    numbers = final_numbers(results, run.method, run.task.scores)
    for logger in loggers.all():
        tracker = tracker_of(logger)
        with sparing(logger, "how the run ended"):
            for name, (header, rows) in tables.items():
                tracker.table(name, header, rows)
            tracker.examples("test/examples", examples[: tracker.allowed.examples])
            if confusion:
                tracker.confusion("test/confusion", confusion)
            tracker.summary(numbers)
    _adapters(loggers, run, results)


@rank_zero_only
def log_method(loggers: Loggers, result: Result, scores: Sequence[Score]) -> None:
    """Tell those of a method that the run was compared with how it ended."""
    for logger in loggers.all():
        with sparing(logger, f"how {result.method} ended"):
            tracker_of(logger).summary(final_numbers([result], result.method, scores))


def _adapters(loggers: Loggers, run: Run, results: Sequence[Result]) -> None:
    """The adapter of the tested epoch as `best`, that of the last as `last`, to those that may have them."""
    folder = Path(run.config.run_dir)
    taking = [one for one in loggers.all() if tracker_of(one).keeps and tracker_of(one).allowed.adapter]
    if not taking or not (folder / ADAPTER).is_dir():
        return
    for path, aliases in _epochs(folder, run.method):
        for logger in taking:
            with sparing(logger, f"the adapter as {' and '.join(aliases)}"):
                _adapter(logger, path, aliases, run, results)


def _adapter(logger: Logger, path: Path, aliases: list[str], run: Run, results: Sequence[Result]) -> None:
    tracker = tracker_of(logger)
    name = tracker.allowed.artifact or f"adapter-{tracker.id()}"
    address = _address(logger, name, aliases[0])
    with upload_of(path, address, results if "best" in aliases else None, run.task.scores) as upload:
        if isinstance(logger, WandbLogger):
            log_adapter(logger.experiment, upload, artifact_name(name), aliases)
        else:
            about = {**upload.metadata, "base": upload.base}
            tracker.files(artifact_name(name), upload.files, aliases, about)
    if address:
        print(f"The adapter goes to {address}")


def _epochs(folder: Path, method: str) -> list[tuple[Path, list[str]]]:
    """Where the adapters of the best and of the last epoch are; in one where that is the same."""
    best, last = folder / ADAPTER, folder / "checkpoints" / "last.ckpt"
    if method == "peft" or not last.is_file():  # PEFT's lie in no checkpoint of ours
        return [(best, ["best"])]
    tensors, others = (read_source(path).saved.tensors for path in (best, last))
    if all(torch.equal(tensor, others[name]) for name, tensor in tensors.items()):
        return [(best, ["best", "last"])]
    return [(last, ["last"]), (best, ["best"])]


def _address(logger: Logger, name: str, alias: str) -> str:
    """Under which an adapter will be found; empty where that is not known yet."""
    if not isinstance(logger, WandbLogger) or logger.experiment.offline:
        return ""
    run = logger.experiment
    return f"wandb:{run.entity}/{run.project}/{artifact_name(name)}:{alias}"


def final_numbers(results: Sequence[Result], method: str, scores: Sequence[Score]) -> dict[str, float]:
    """The scores of the test with their intervals, and what they cost, as `final/acc`; of the methods that
    the run was compared with as `final/full/acc`.

    Args:
        method: the run's own, whose first score comes first.
    """
    told: dict[str, float] = {}
    for result in sorted(results, key=lambda one: one.method != method):
        place = "final" if result.method == method else f"final/{result.method}"
        for score in scores:
            if score.name in result.scores:
                told[f"{place}/{score.name}"] = result.scores[score.name]
            if bounds := result.intervals.get(score.name):
                told[f"{place}/{score.name}_low"], told[f"{place}/{score.name}_high"] = bounds
        told[f"{place}/trained_parameters"] = result.trained
        if result.seconds is not None:
            told[f"{place}/seconds"] = round(result.seconds, 3)
        if result.checkpoint_bytes is not None:
            told[f"{place}/checkpoint_mb"] = result.checkpoint_bytes / 1e6
    return told
