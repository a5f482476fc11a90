"""GradientNorm: logs the length of the whole gradient before each optimizer step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class GradientNorm(Callback):
    """Logs `train/gradient_norm`, the 2-norm over all parameters of the optimizer, before clipping."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        gradients: list[Any] = [
            p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
        pl_module.log("train/gradient_norm", get_total_norm(gradients))
