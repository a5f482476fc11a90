"""Preemption: a cluster's SIGTERM becomes a checkpoint to go on from, not a lost epoch."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lora_lightning.app.launch import PREEMPTED
from lora_lightning.utils.marks import path


class Preemption(pl.Callback):
    """Saves `last.ckpt` and ends the run when SIGTERM arrives during a fit.

    It waits for the end of the training step, and with gradient accumulation of the optimizer's, so that
    the checkpoint is one that a run goes on from; during validation, for the next training step. All
    processes agree at that point, so that the signal may reach one of them or all.

    Lightning by itself ends the run without saving, with exit code 0, and its handler waits for the other
    processes from within whatever it interrupts; this one takes its place during the fit.

    Args:
        dirpath: folder of the checkpoint; that of ModelCheckpoint, so that `ckpt_path="last"` finds it.

    Raises:
        Preempted: after the checkpoint is written.
    """

    def __init__(self, dirpath: Annotated[str | os.PathLike[str], path()]) -> None:
        self.dirpath = Path(dirpath)
        self._received = False
        self._before: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._received = False
        self._before = signal.signal(signal.SIGTERM, self._receive)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if accumulating or not trainer.strategy.reduce_boolean_decision(self._received, all=False):
            return
        trainer.save_checkpoint(self.dirpath / "last.ckpt")
        raise Preempted(started_by_lightning(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A signal during the last validation: no step follows, and the epoch's checkpoint is written."""
        self._restore()
        if trainer.strategy.reduce_boolean_decision(self._received, all=False):
            raise Preempted(started_by_lightning(trainer))

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None


class Preempted(SIGTERMException):
    """Ends a process after SIGTERM, with the exit code that says so."""

    def __init__(self, helper: bool) -> None:
        # Lightning kills the first process when one that it has started ends with another code than 0.
        super().__init__(0 if helper else PREEMPTED)


def started_by_lightning(trainer: pl.Trainer) -> bool:
    """Whether this is a process that Lightning's launcher has started beside the first."""
    launched_by: Any = getattr(trainer.strategy, "cluster_environment", None)
    return type(launched_by).__name__ == "LightningEnvironment" and trainer.local_rank != 0
