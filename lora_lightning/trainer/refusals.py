"""What LoRACallback refuses of a Trainer and a module, and what it warns of; nothing is changed here."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.adapters.manage import lora_parameters
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.files.random_base import looks_untrained
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.hparams import unsafe_hparams
from lora_lightning.utils.tables import truncate_list


def refuse_beside(trainer: Any) -> None:
    """Refuse what cannot be in a Trainer beside LoRACallback.

    Raises:
        ConfigError: a callback that trains the backbone, or a precision that replaces adapted layers.
    """
    if any(is_a(callback, "BackboneFinetuning") for callback in trainer.callbacks):
        raise ConfigError([
            "BackboneFinetuning trains the backbone that LoRA keeps frozen: give one of the two. To "
            "train some of its layers in full beside LoRA, name them in modules_to_save."
        ])  # fmt: skip
    if is_a(trainer.precision_plugin, "BitsandbytesPrecision"):
        raise ConfigError([
            "BitsandbytesPrecision puts layers of its own in the place of the adapted ones: leave it "
            "out, and call lora_lightning.quantize(model, 'nf4') where the module builds its model."
        ])  # fmt: skip


def refuse_untrained(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse to train what would not train.

    Raises:
        UserError: the updates are frozen, or no optimizer holds them.
    """
    updates = lora_parameters(pl_module)
    if frozen := sum(not p.requires_grad for p in updates):
        raise UserError(
            f"{frozen} of the {len(updates)} LoRA parameters were frozen after setup and would not "
            "train: another callback or hook sets requires_grad; leave the backbone to LoRACallback."
        )
    groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups]
    optimized = {id(p) for group in groups for p in group["params"]}
    trained = updates or [p for p in pl_module.parameters() if p.requires_grad]  # no layer may be adapted
    if trainer.optimizers and not any(id(p) in optimized for p in trained):
        raise UserError(
            "no optimizer holds the LoRA parameters: make the optimizer in configure_optimizers, "
            "from self.parameters(), not from a list made in __init__."
        )


def warn_of_random_base(pl_module: pl.LightningModule) -> None:
    """Warn where the frozen weights look untrained."""
    if looks_untrained(pl_module):
        rank_zero_warn(
            f"the frozen weights of {type(pl_module).__name__} look random: every norm layer is as it "
            "was built. LoRA adapts pretrained weights: load them before the fit. An adapter of random "
            'weights works on these alone: keep them, as LoRACallback(checkpoint="full") does.'
        )


def warn_of_hparams(trainer: Any, pl_module: pl.LightningModule) -> None:
    """Warn of hyperparameters that keep checkpoints from loading with `weights_only=True`."""
    for owner in (pl_module, trainer.datamodule):
        if owner is not None and (unsafe := unsafe_hparams(owner)):
            rank_zero_warn(
                f"checkpoints will not load with weights_only=True, the safe way, because of these "
                f"hyperparameters of {type(owner).__name__}: {truncate_list(unsafe)}. Keep plain values: "
                "save_hyperparameters(ignore=[...]), OmegaConf.to_container(config, resolve=True)."
            )
