"""The length of the gradient before optimizer steps: of all that trains, or of the updates alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lora_lightning.adapters.manage import lora_parameters
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.strategies import UNSHARDED


class GradientNorm(Callback):
    """Logs `train/gradient_norm`, the 2-norm over all parameters of the optimizer, before clipping."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        pl_module.log("train/gradient_norm", get_total_norm(_gradients(optimizer)))


class UpdateGradients:
    """Logs `lora/grad_norm`, the 2-norm over the updates, before clipping, where the Trainer logs a step.

    Args:
        pl_module: adapted, by `LoRACallback`.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._updates = {id(p) for p in lora_parameters(pl_module)}

    def before_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """An optimizer is about to step; one that holds no updates is none of ours."""
        every = trainer.log_every_n_steps
        if not (trainer.loggers and every and is_a(trainer.strategy, *UNSHARDED)):
            return
        if (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every:  # as the Trainer counts
            return
        if gradients := _gradients(optimizer, self._updates):
            pl_module.log("lora/grad_norm", get_total_norm(gradients))


def _gradients(optimizer: Optimizer, of: set[int] | None = None) -> list[Any]:
    """Those that an optimizer steps by, of all its parameters or of some."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p.grad for p in parameters if p.grad is not None and (of is None or id(p) in of)]
