"""The optimizer and its schedule of a task: which parameters get which rate, and how it goes."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from lora_lightning.errors import ConfigError
from lora_lightning.layers.registry import update_ids
from lora_lightning.planning.heads import find_heads
from lora_lightning.tasks.layer_rates import layers_of
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.tasks.optimizers import KINDS, class_of, options_for
from lora_lightning.tasks.schedules import needs_an_end, schedule_of
from lora_lightning.utils.names import submodule


def head_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the output layers, by timm's `get_classifier` or the model's structure."""
    return {p for name in find_heads(model) for p in submodule(model, name).parameters()}


def parameter_groups(module: nn.Module, head: set[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """What trains in `module`, in the order of its parameters, as groups for an optimizer.

    Returns:
        The groups "backbone", "backbone_no_decay", "head" and "head_no_decay", the empty ones left
        out. Updates and parameters of fewer than two dimensions are not decayed. With `layer_decay` the
        backbone's are so many for each layer, "backbone.00" the first.

    Raises:
        ConfigError: nothing trains; `head_lr` is given and no part of the head trains; or `layer_decay`, and
            no blocks are found.
    """
    layers, last = _layers(module, config)
    groups: dict[str, dict[str, Any]] = {}
    updates = update_ids(module)
    for parameter in module.parameters():
        if parameter.requires_grad:
            undecayed = id(parameter) in updates or parameter.ndim < 2
            part, lr = "head", config.head_lr or config.lr
            if parameter not in head:
                part, lr = "backbone", config.lr
                if config.layer_decay is not None:
                    layer = layers[id(parameter)]
                    part, lr = f"backbone.{layer:02}", lr * config.layer_decay ** (last - layer)
            name, decay = (f"{part}_no_decay", 0.0) if undecayed else (part, config.weight_decay)
            new = {"name": name, "params": [], "lr": lr, "weight_decay": decay}
            groups.setdefault(name, new)["params"].append(parameter)
    if not groups:
        raise ConfigError([f"no parameter of {type(module).__name__} requires a gradient."])
    if config.head_lr is not None and not any("head" in name for name in groups):
        problem = (
            f"head_lr={config.head_lr}: no head trains in {type(module).__name__}: none is found, or"
            " it is frozen. Give head_lr=null."
        )
        raise ConfigError([problem])
    return [groups[name] for name in sorted(groups)]


def _layers(module: nn.Module, config: OptimConfig) -> tuple[dict[int, int], int]:
    """As `layers_of`, where the rate depends on it."""
    if config.layer_decay is None:
        return {}, 0
    layers, last = layers_of(module)
    if last < 2:
        problem = (
            f"layer_decay={config.layer_decay}: no blocks are found in {type(module).__name__}. Give null."
        )
        raise ConfigError([problem])
    return layers, last


def optimizer_of(
    groups: list[dict[str, Any]], config: OptimConfig, total_steps: float, fused: bool = False
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer of these groups and its schedule, to be stepped after each optimizer step.

    Raises:
        LibraryError: the optimizer's library is missing or too old.
    """
    options = options_for(config.name, vars(config))
    if config.name == "muon":  # it is for hidden matrices
        groups = [{**g, "use_fallback": g["name"].startswith("head")} for g in groups]
    if KINDS[config.name].fused:
        options["fused"] = fused or None
    optimizer = class_of(config.name)(groups, lr=config.lr, **options)

    def stay(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Not as the run did that wrote the checkpoint: it may have clipped, or had another precision."""
        return {**state, "param_groups": [{**g, "fused": fused or None} for g in state["param_groups"]]}

    if KINDS[config.name].fused:
        optimizer.register_load_state_dict_pre_hook(stay)
    return optimizer, LambdaLR(optimizer, schedule_of(config.rate_schedule, total_steps))


def may_be_fused(trainer: L.Trainer, groups: list[dict[str, Any]]) -> bool:
    """Whether one kernel may update all parameters: a third of the time of AdamW's usual ones, on a CPU too.

    Lightning refuses to clip gradients of such an optimizer under mixed precision. Parameters of other types
    than torch's own (DTensor) keep the usual ones.
    """
    if trainer.gradient_clip_val and isinstance(trainer.precision_plugin, (MixedPrecision, FSDPPrecision)):
        return False
    devices = _get_fused_kernels_supported_devices()
    parameters = [p for group in groups for p in group["params"]]
    return all(type(p) is nn.Parameter and p.device.type in devices for p in parameters)


def configured(
    module: L.LightningModule, head: set[nn.Parameter], config: OptimConfig
) -> OptimizerLRScheduler:
    """What `configure_optimizers` of a task returns: the optimizer of what trains, its rate set at each step.

    Raises:
        ConfigError: the number of steps is not known and the schedule needs it; nothing trains; the optimizer
            takes no sharded parameters.
        LibraryError: the optimizer's library is missing or too old.
    """
    steps = module.trainer.estimated_stepping_batches
    if math.isinf(steps) and needs_an_end(config.rate_schedule):
        problem = (
            "trainer.max_epochs=-1: the learning rate follows the number of steps, so it must be known. Give"
            " trainer.max_epochs or trainer.max_steps, or schedule=constant schedule.warmup=0."
        )
        raise ConfigError([problem])
    groups = parameter_groups(module, head, config)
    sharded = any(type(p) is not nn.Parameter for group in groups for p in group["params"])
    if sharded and KINDS[config.name].library != "torch":
        raise ConfigError([
            f"optim.name={config.name}: {KINDS[config.name].library} takes no parameters that are sharded "
            "over processes; take adamw, or trainer=ddp."
        ])  # fmt: skip
    optimizer, scheduler = optimizer_of(groups, config, steps, may_be_fused(module.trainer, groups))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
