"""Which process speaks for all of a distributed run. Loads nothing."""

from __future__ import annotations

import os
import sys

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in Lightning's order


def on_rank_zero() -> bool:
    """Whether this process is the one that prints and logs."""
    known = sys.modules.get("lightning_utilities.core.rank_zero")
    rank = getattr(getattr(known, "rank_zero_only", None), "rank", None)
    if rank is None:  # Lightning is not loaded yet
        rank = next((os.environ[name] for name in RANKS if name in os.environ), 0)
    return str(rank) == "0"
