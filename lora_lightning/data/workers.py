"""How many processes load the data of one training process."""

from __future__ import annotations

import os

import lightning as L

MOST = 8


def loading_workers(asked: int | None, trainer: L.Trainer | None) -> int:
    """What was asked for; None takes this machine's cores, shared by the training processes, at most 8."""
    if asked is not None:
        return asked
    processes = 1 if trainer is None else trainer.world_size
    return max(1, min(MOST, (os.cpu_count() or 1) // processes))
