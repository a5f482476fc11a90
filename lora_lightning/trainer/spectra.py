"""The spectra of the updates, told to the Trainer's loggers after each epoch."""

from __future__ import annotations

import lightning.pytorch as pl

from lora_lightning.adapters.spectra import spectra_now
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.strategies import UNSHARDED


def log_spectra(trainer: pl.Trainer, pl_module: pl.LightningModule, layers: bool) -> None:
    """Log the means over the layers of the first selected adapter's updates, by `LightningModule.log`;
    nothing without a logger, or where a strategy leaves parts of the updates in each process.

    Args:
        layers: log those of each layer too, as `lora/effective_rank/<layer>`.
    """
    if not trainer.loggers or not is_a(trainer.strategy, *UNSHARDED):
        return
    found = spectra_now(pl_module)
    told = {f"lora/{name}": value for name, value in found.mean().items()}
    if layers:
        told |= {f"lora/effective_rank/{name}": one.effective_rank for name, one in found.items()}
        told |= {f"lora/stable_rank/{name}": one.stable_rank for name, one in found.items()}
        told |= {f"lora/relative_norm/{name}": one.relative or 0.0 for name, one in found.items()}
    for name, value in told.items():
        pl_module.log(name, value, on_epoch=True, sync_dist=trainer.world_size > 1)
