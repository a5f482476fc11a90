"""Hyperparameters: what loggers are told of an adapted module, and which keep checkpoints from loading."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import AdapterFileError
from lora_lightning.files.allowed import BUILDERS, calls
from lora_lightning.planning.plan import Plan
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.trackers.choice import tracker_of
from lora_lightning.utils.tables import truncate_list

LOGGED_AS = "LoRACallback"  # a name of its own, so that no hyperparameter of the module's is replaced
STORED = ("hparams", "module_arguments", "hyper_parameters")  # Lightning's keys, of old and now
INSTANTIATOR, CLASSES = "_instantiator", ("class_path", "_class_path")  # what LightningCLI obeys
LIGHTNING_CLI = "lightning.pytorch.cli.instantiate_module"
PLAN = ("layer", "kind", "weight", "rank", "alpha", "parameters")  # the head of a plan as a table


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
            **({"decided": planned.by_data, "ranks": _ranks(planned)} if planned.by_data else {}),
        }
    }


def plan_rows(planned: Plan) -> list[list[Any]]:
    """A plan as a table under `PLAN`."""
    return [
        [p.name, p.kind, "×".join(map(str, p.shape)), p.rank, p.alpha, p.parameters] for p in planned.layers
    ]


def _ranks(planned: Plan) -> dict[str, int]:
    """By layer, without the dots that loggers would take for levels."""
    return {layer.name.replace(".", "/"): layer.rank for layer in planned.layers}


def log_plan(trainer: Any, planned: Plan) -> None:
    """Give the loggers of the Trainer that show tables the plan."""
    if trainer.is_global_zero and planned.layers:
        for logger in trainer.loggers:
            tracker_of(logger).table("plan", PLAN, plan_rows(planned))


def log_to_all(trainer: Any, pl_module: pl.LightningModule, about: dict[str, Any]) -> None:
    """Give every logger of the Trainer these hyperparameters beside those of the module, which the Trainer
    logs afterwards; nothing with `Trainer(enable_autolog_hparams=False)`."""
    if not trainer.is_global_zero or not getattr(trainer, "enable_autolog_hparams", True):
        return
    owners = (pl_module, trainer.datamodule)
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


def refuse_calls(checkpoint: Mapping[str, Any], path: object, given: Collection[str]) -> dict[str, None]:
    """Refuse hyperparameters that would have something called: by Hydra, by LightningCLI, or by a module
    that hands them to one of these.

    Args:
        path: of the checkpoint, for the error.
        given: names of the hyperparameters that the caller replaces.

    Returns:
        Arguments for Lightning's `load_from_checkpoint` with which it calls the module's class itself, also
        where LightningCLI has noted that it shall.

    Raises:
        AdapterFileError: a hyperparameter names what is to be called.
    """
    if checkpoint.get("hparams_name") in given:  # all of them are one argument, and replaced
        return {}
    stored = [checkpoint[key] for key in STORED if isinstance(checkpoint.get(key), Mapping)]
    kept = {name: v for values in stored for name, v in values.items() if name not in given}
    own = [name for names in BUILDERS.values() for name in names]
    found = calls(kept, "", own) + calls(kept, "", keys=CLASSES)
    noted = kept.pop(INSTANTIATOR, None)
    if noted is not None and (noted != LIGHTNING_CLI or any(isinstance(v, Mapping) for v in kept.values())):
        found.append(f"{INSTANTIATOR}={noted}")  # of other values than plain ones it would make objects
    if found:
        raise AdapterFileError(
            f"{path}: its hyperparameters name what is to be called, {truncate_list(found)}, which is not "
            "run "
            "unasked. Give these hyperparameters as arguments of load_from_checkpoint, or weights_only=False "
            "if you trust the file."
        )
    return {INSTANTIATOR: None} if noted is not None else {}
