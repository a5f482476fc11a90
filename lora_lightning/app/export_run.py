"""The end of a run with `export=`: what it trained as a file, tested from the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from lora_lightning.app.export import exported
from lora_lightning.app.results import Result
from lora_lightning.exporting.exported import Exported
from lora_lightning.tasks.scores import Score

FOLDER = "exported"  # of the run's


def exported_result(
    config: DictConfig, results: Sequence[Result], scores: Sequence[Score], folder: Path
) -> tuple[Exported, Result]:
    """Write the folder of the exported file, and its row of the table.

    Args:
        config: of the run, with `export`.
        results: of the run, its own among them; and of the methods that it was compared with.
        scores: of the task.
        folder: of the run, where its weights lie.

    Raises:
        UserError: it cannot be exported so.
        WriteError: the folder cannot be written.
    """
    options = {
        "adapter": str(folder),
        "out": folder / FOLDER,
        "format": config.export.format,
        "evaluate": True,
        "overwrite": True,
    }
    if config.export.quantize:
        options["quantize"] = config.export.quantize
    told, found = exported(options, [], results, scores)
    assert found is not None
    own = next(r for r in results if r.method == config.method)
    words = f"int8 {told.quantize}" if told.quantize else "float32"
    row = replace(
        own, method=FOLDER, title=f"exported, {words}", scores=found.values, intervals=found.intervals,
        seconds=None, checkpoint_bytes=told.bytes, best_validation=None,
    )  # fmt: skip
    return told, row
