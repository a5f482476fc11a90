"""Trainings of the tuning benchmarks: one thread, and nothing printed or written."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
import torch
from torch import nn


def quiet() -> None:
    """One thread, and neither notes nor warnings of Lightning."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)


def trainer(**options: Any) -> L.Trainer:
    """A Trainer on the CPU without logger, checkpoints and progress bar."""
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


class FrozenStatistics(L.Callback):
    """Batch norms keep their statistics, as LoRACallback has them by default, in a training without it."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
