"""What is said on the screen: by the first process alone, and with short paths. Loads nothing heavy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in Lightning's order


def on_rank_zero() -> bool:
    """Whether this process is the one that prints and logs."""
    known = sys.modules.get("lightning_utilities.core.rank_zero")
    rank = getattr(getattr(known, "rank_zero_only", None), "rank", None)
    if rank is None:  # Lightning is not loaded yet
        rank = next((os.environ[name] for name in RANKS if name in os.environ), 0)
    return str(rank) == "0"


def say(text: str) -> None:
    """Print in the first process."""
    if on_rank_zero():
        print(text)


def short_path(path: str | Path) -> str:
    """Relative to the working directory where that is shorter."""
    absolute = os.path.abspath(path)
    return min(absolute, os.path.relpath(absolute), key=len)
