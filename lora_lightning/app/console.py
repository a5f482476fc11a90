"""What is said on the screen: by the first process alone, and with short paths. Loads nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

from lora_lightning.utils.ranks import on_rank_zero


def say(text: str) -> None:
    """Print in the first process."""
    if on_rank_zero():
        print(text)


def short_path(path: str | Path) -> str:
    """Relative to the working directory where that is shorter."""
    absolute = os.path.abspath(path)
    return min(absolute, os.path.relpath(absolute), key=len)
