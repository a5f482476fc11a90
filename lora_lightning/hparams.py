"""Hyperparameters: what loggers are told of an adapted module, and which keep checkpoints from loading."""

from __future__ import annotations

import io
from typing import Any

import lightning.pytorch as pl
import torch

from lora_lightning.config import LoRAConfig
from lora_lightning.plans import Plan
from lora_lightning.twins import is_a

LOGGED_AS = "LoRACallback"  # a name of its own, so that no hyperparameter of the module's is replaced


def logged(config: LoRAConfig, planned: Plan, adapter: str) -> dict[str, Any]:
    """What loggers are told of an adapter: its configuration, and how much it trains."""
    return {
        LOGGED_AS: {
            "adapter": adapter,
            **config.to_dict(),
            "adapted_layers": len({layer.module for layer in planned.layers}),
            "trainable_parameters": planned.trainable,
            "total_parameters": planned.total,
            "trainable_fraction": round(planned.trainable / planned.total, 6),
        }
    }


def log_to_all(trainer: pl.Trainer, pl_module: pl.LightningModule, about: dict[str, Any]) -> None:
    """Give every logger of the Trainer these hyperparameters beside those of the module, which the Trainer
    logs afterwards; nothing with `Trainer(enable_autolog_hparams=False)`."""
    if not trainer.is_global_zero or not getattr(trainer, "enable_autolog_hparams", True):
        return
    owners = (pl_module, trainer.datamodule)  # type: ignore[attr-defined]
    own = [o.hparams_initial for o in owners if o is not None and o._log_hyperparams]
    for logger in trainer.loggers:
        # TensorBoard's page of hyperparameters shows what is logged first, and that alone.
        first = is_a(logger, "TensorBoardLogger")
        before = {k: v for hparams in own for k, v in hparams.items()} if first else {}
        logger.log_hyperparams({**before, **about})
        logger.save()


def unsafe_hparams(owner: Any) -> list[str]:
    """Hyperparameters of a LightningModule or LightningDataModule that `torch.load(weights_only=True)`
    refuses: `optimizer (partial)`."""
    return [
        f"{name} ({type(value).__name__})" for name, value in dict(owner.hparams).items() if not _safe(value)
    ]


def _safe(value: Any) -> bool:
    if isinstance(value, torch.nn.Module):
        return False
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # pickle and torch raise many kinds
        return False
    return True
