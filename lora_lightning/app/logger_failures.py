"""A tracker that fails amid a training, told as what it is, and not as the run's own disk."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

from lora_lightning.trainer.compat import is_a


def logger_failure(error: BaseException, folder: Path | None) -> str:
    """What one of the Trainer's loggers has failed with; empty where none is at fault, or where it cannot
    write into the run's own folder, whose disk others fill as well.

    Args:
        folder: the run's.
    """
    if not isinstance(error, Exception) or (logger := _within(error)) is None:
        return ""
    place = getattr(error, "filename", None) or (getattr(logger, "save_dir", None) or "")
    if isinstance(error, OSError) and error.errno and folder and _lies_in(place, folder):
        return ""
    said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    name = type(logger).__name__
    stop = "" if said.endswith((".", "!")) else "."
    return f"{name} has failed: {said[:300]}{stop} The run ends with it: mend that, or give logger=csv."


def _within(error: BaseException) -> Any:
    """The logger in whose method the error was raised; None of any other."""
    owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((owner for owner in owners if is_a(owner, "Logger")), None)


def _lies_in(place: object, folder: Path) -> bool:
    return isinstance(place, (str, os.PathLike)) and Path(place).absolute().is_relative_to(folder.absolute())
