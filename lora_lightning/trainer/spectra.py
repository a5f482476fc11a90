"""The spectra of the updates, told to the Trainer's loggers after each epoch, and as a table at the end."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from torch import Tensor

from lora_lightning.adapters.spectra import spectra_now
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.strategies import UNSHARDED
from lora_lightning.trainer.trackers.choice import trackers_of
from lora_lightning.trainer.trackers.tracker import sparing

HEADER = ("layer", "rank", "effective rank", "stable rank", "‖ΔW‖", "‖ΔW‖/‖W‖")
EACH = ("effective_rank", "stable_rank", "relative_norm")  # of what is logged, by layer


def log_spectra(
    trainer: pl.Trainer, pl_module: pl.LightningModule, layers: bool, norms: dict[str, Tensor]
) -> None:
    """Log the means over the layers of the first selected adapter's updates, and the length of all of them
    together, by `LightningModule.log`; nothing without a logger, or where a strategy leaves parts of the
    updates in each process.

    Args:
        layers: log those of each layer too, as `lora/effective_rank/<layer>`.
        norms: of the base weights, by layer, which do not change in a fit; those that are new come to it.
    """
    if not has_spectra(trainer):
        return
    found = spectra_now(pl_module, norms=norms)
    if not found:
        return
    told = {f"lora/{name}": value for name, value in found.mean().items()}
    told["lora/update_norm"] = math.sqrt(sum(one.norm**2 for one in found.values()))
    if layers:
        told |= {f"lora/effective_rank/{name}": one.effective_rank for name, one in found.items()}
        told |= {f"lora/stable_rank/{name}": one.stable_rank for name, one in found.items()}
        told |= {f"lora/relative_norm/{name}": one.relative or 0.0 for name, one in found.items()}
    for name, value in told.items():
        pl_module.log(name, value, on_epoch=True, sync_dist=trainer.world_size > 1)


def log_spectra_table(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """The spectra of each layer's update as a table, `spectra`, for the loggers that show tables."""
    if not has_spectra(trainer) or not trainer.is_global_zero:
        return
    rows = [
        (name, one.values.shape[1], one.effective_rank, one.stable_rank, one.norm, one.relative)
        for name, one in spectra_now(pl_module).items()
    ]
    for tracker in trackers_of(trainer.loggers) if rows else ():
        with sparing(tracker.logger, "the table of spectra"):
            tracker.table("spectra", HEADER, rows)


def hide_layers(trainer: pl.Trainer) -> None:
    """W&B draws a chart of everything that is logged: of three for each layer none by itself."""
    if trainer.is_global_zero:
        for tracker in trackers_of(trainer.loggers):
            for name in EACH:
                tracker.hide(f"lora/{name}/")


def has_spectra(trainer: pl.Trainer) -> bool:
    """Whether somebody listens, and each process holds whole updates."""
    return bool(trainer.loggers) and is_a(trainer.strategy, *UNSHARDED)
