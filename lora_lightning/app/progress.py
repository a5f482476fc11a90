"""How a training shows its progress: one bar on a terminal, a few lines in a log file."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

LINES = 5  # of one training, in a log file
WIDTH = 18  # of the label


class Progress(ProgressBar):
    """One line over the whole training, redrawn on a terminal; elsewhere at most LINES lines.

    Args:
        label: what is trained, such as "LoRA".
        enabled: show anything at all.
    """

    def __init__(self, label: str, enabled: bool = True) -> None:
        super().__init__()
        self.label = label
        self.enabled = enabled
        self._bar: tqdm | None = None
        self._start = 0.0
        self._shown = 0

    def disable(self) -> None:
        """Lightning's, on every rank but 0."""
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._shown = time.perf_counter(), 0
        steps = trainer.estimated_stepping_batches
        if self.enabled and sys.stdout.isatty():
            self._bar = tqdm(
                total=None if math.isinf(steps) else int(steps),
                initial=trainer.global_step,
                desc=self.label.ljust(WIDTH),
                bar_format="{desc} {bar:28} {percentage:3.0f} %  {elapsed}<{remaining}{postfix}",
                file=sys.stdout,
                leave=True,
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._bar is not None and trainer.global_step > self._bar.n:
            self._bar.update(trainer.global_step - self._bar.n)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.enabled or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self._bar is not None:
            self._bar.set_postfix_str(_state(trainer, pl_module))
            return
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs
        due = LINES if not last or last < 0 else math.ceil(LINES * epoch / last)
        if due > self._shown or epoch == last:
            self._shown = due
            seconds = time.perf_counter() - self._start
            print(f"{self.label:<{WIDTH}} {_state(trainer, pl_module)}  {seconds:5.0f} s", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _state(trainer: pl.Trainer, task: pl.LightningModule) -> str:
    """`epoch 3/20  train/loss 1.204  val/acc 61.3`"""
    last = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
    epoch = f"{trainer.current_epoch + 1:>{len(str(last or 1))}}" + (f"/{last}" if last else "")
    parts = [f"epoch {epoch}"]
    metrics = trainer.callback_metrics
    if "train/loss" in metrics:
        parts.append(f"train/loss {float(metrics['train/loss']):.3f}")
    scores: Any = task.scores
    for score in scores[:1]:
        if (name := f"val/{score.name}") in metrics:
            parts.append(f"{name} {score.show(float(metrics[name])):>4}")
    return "  ".join(parts)
