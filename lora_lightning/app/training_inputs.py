"""What a task's network is given in training: to choose ranks and the ranges of int8 by."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lora_lightning.errors import UserError


class _Called(Exception):
    """The network was called, which is all that is waited for."""


def training_inputs(task: Any, data: L.LightningDataModule, most: int, purpose: str) -> list[Any]:
    """What the network is called with in the first steps of a training, which trains nothing.

    Args:
        task: has a `model`, which its `training_step` calls as a whole.
        most: steps.
        purpose: the function of this package that takes what is given, for an error.

    Returns:
        For each step the positional arguments, or all of them by name.

    Raises:
        UserError: the training step does not call the network as a whole.
    """
    seen: list[Any] = []
    calibrated = getattr(task, "temperature", None)  # which the beginning of a fit forgets

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_named(module, args, kwargs))
        raise _Called

    hook = task.model.register_forward_pre_hook(take, with_kwargs=True)
    task.__dict__["training_step"] = _watched(task.training_step, type(task).__name__, purpose)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=most, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    try:
        with isolate_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a training step that gives no loss
            trainer.fit(task, datamodule=data)
    finally:
        hook.remove()
        del task.__dict__["training_step"]
        if calibrated is not None:
            task.temperature = calibrated
    return seen


def _watched(step: Callable[[Any, int], Any], name: str, purpose: str) -> Callable[[Any, int], None]:
    """A training step that ends where the network is called."""

    def training_step(batch: Any, batch_idx: int) -> None:
        try:
            step(batch, batch_idx)
        except _Called:
            return
        raise UserError(
            f"{purpose}: {name}.training_step does not call its network as a whole, so that nothing shows "
            f"what it is given: call lora_lightning.{purpose} from Python, with inputs of your own."
        )

    return training_step


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments as `compress` and `export` take a batch."""
    if not kwargs:
        return args
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
