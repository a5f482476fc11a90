"""Hyperparameters that keep a checkpoint from being loaded safely."""

from __future__ import annotations

import io
from typing import Any

import torch


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
