"""How a training and a test of the application show their progress: in the way of `utils.progress`."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from lora_lightning.trainer.callback import LoRACallback
from lora_lightning.utils.progress import Bar, speed


class Progress(ProgressBar):
    """A bar over the whole training on a terminal and in a notebook; elsewhere a line for each epoch.

    It says the epoch, the loss of the last step, the first of the task's scores in validation, the time that
    is left, samples a second of all processes, and how many parameters train.

    Args:
        label: what is trained, such as "LoRA"; empty where a test needs no name.
        trained: how many parameters train; None asks the plan of a `LoRACallback`, else the module.
    """

    def __init__(self, label: str, trained: int | None = None) -> None:
        super().__init__()
        self.label, self.trained = label, trained
        self._enabled = True
        self._bar: Bar | None = None

    def disable(self) -> None:
        """Lightning's, on every rank but 0."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(Training(self.label, trainer, pl_module, self._trained(trainer, pl_module)))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(self._bar, Training):
            self._bar.step(outputs, samples_of(batch))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(self._bar, Training) and self._bar.unsaid:  # no validation has ended it
            self._bar.milestone()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is None and trainer.state.fn == "validate":
            self._begin(self._evaluation("validating", trainer.num_val_batches))

    def on_validation_batch_start(self, *_: Any) -> None:
        if isinstance(self._bar, Training):
            self._bar.validating()

    def on_validation_batch_end(self, *_: Any) -> None:
        if self._bar is not None and not isinstance(self._bar, Training):
            self._bar.advance()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(self._bar, Training):
            self._bar.validated()
        else:  # of trainer.validate, or of the check before a training, which shows nothing
            self._end()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(self._evaluation("testing", trainer.num_test_batches))

    def on_test_batch_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.advance()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end(exception)

    def _evaluation(self, doing: str, batches: Any) -> Bar:
        return Bar(f"{self.label}: {doing}" if self.label else doing, _count(batches), "batches")

    def _begin(self, bar: Bar) -> None:
        if self._enabled:
            self._bar = bar.__enter__()

    def _end(self, error: BaseException | None = None) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.__exit__(error)

    def _trained(self, trainer: pl.Trainer, module: pl.LightningModule) -> int:
        """What data have decided at the start of the fit, else as given, else as counted."""
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # the Trainer sets it when it is made
        plans = [c.plan for c in callbacks if isinstance(c, LoRACallback) and c.plan is not None]
        if plans:
            return plans[0].trainable
        return self.trained or sum(p.numel() for p in module.parameters() if p.requires_grad)


class Training(Bar):
    """The bar of a training; what is done of it are steps of the optimizer.

    Args:
        trained: how many parameters train.
    """

    def __init__(self, label: str, trainer: pl.Trainer, module: pl.LightningModule, trained: int) -> None:
        steps = trainer.estimated_stepping_batches
        super().__init__(label, None if math.isinf(steps) else float(steps), delay=0.0, stays=True)
        self.trainer, self.module, self.trained = trainer, module, trained
        self.done = self.begun = float(trainer.global_step)
        self.unsaid = False  # whether there are steps since the last line
        self.loss: Any = None
        self.samples = 0
        self.epoch = _epoch(trainer)
        self.validation = 0.0  # seconds of all that are over
        self.validates_since: float | None = None

    def step(self, outputs: Any, samples: int) -> None:
        """After a batch of so many samples, with what the training step gave."""
        self.loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.samples += samples * self.trainer.world_size
        self.epoch, self.unsaid = _epoch(self.trainer), True
        self.advance(self.trainer.global_step - self.done)

    def validating(self) -> None:
        """Before a batch of a validation."""
        if self.validates_since is None:
            self.validates_since = time.monotonic()
        self.advance(0)

    def validated(self) -> None:
        """After a validation."""
        self.validation, self.validates_since = self._validation(), None
        self.milestone()

    def milestone(self) -> None:
        self.unsaid = False
        super().milestone()

    @property
    def remaining(self) -> float | None:
        done = self.done - self.begun
        return self.seconds * (self.total - self.done) / done if self.total and done > 0 else None

    def parts(self) -> list[str]:
        parts = [self.epoch]
        if isinstance(self.loss, Tensor):
            parts.append(f"loss {float(self.loss):.3f}")
        parts += _score(self.trainer, self.module)
        parts += self.times()
        if self.samples and (training := self.seconds - self._validation()) > 0:
            parts.append(speed(self.samples / training, "samples"))
        return [*parts, f"{self.trained:,} trained"]

    def _validation(self) -> float:
        """Seconds spent in validation."""
        since = self.validates_since
        return self.validation + (time.monotonic() - since if since is not None else 0.0)


def samples_of(batch: Any) -> int:
    """How many samples a batch has: the length of the first that is in it; 0 where that has none."""
    if isinstance(batch, dict):
        batch = next(iter(batch.values()), None)
    elif isinstance(batch, (tuple, list)) and len(batch):
        batch = batch[0]
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    return len(batch) if isinstance(batch, (tuple, list)) else 0


def _count(batches: Any) -> float | None:
    """Of all data loaders together, None where one does not know."""
    total = sum(batches) if isinstance(batches, list) else batches
    return None if math.isinf(total) else float(total)


def _epoch(trainer: pl.Trainer) -> str:
    """`epoch  3/20`, or `epoch 3` where no end is set."""
    last = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
    now = trainer.current_epoch + 1
    return f"epoch {min(now, last):>{len(str(last))}}/{last}" if last else f"epoch {now}"


def _score(trainer: pl.Trainer, task: Any) -> list[str]:
    """`val/acc 61.3`, once there is one."""
    metrics = trainer.callback_metrics
    return [
        f"val/{score.name} {score.show(float(metrics[f'val/{score.name}'])):>4}"
        for score in list(getattr(task, "scores", ()))[:1]
        if f"val/{score.name}" in metrics
    ]
