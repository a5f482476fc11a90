"""AdamW with warm-up and cosine decay, and which parameters get which rate."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from lora_lightning.tasks.optim_config import OptimConfig


def head_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the head by timm's `get_classifier`; none without that method."""
    get_classifier = getattr(model, "get_classifier", None)
    head = get_classifier() if callable(get_classifier) else ()
    layers = [head] if isinstance(head, nn.Module) else list(head)  # distilled models have two
    return {p for layer in layers for p in layer.parameters()}


def parameter_groups(module: nn.Module, head: set[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """What trains in `module`, in the order of its parameters, as groups for an optimizer.

    Returns:
        The groups "backbone", "backbone_no_decay", "head" and "head_no_decay", the empty ones left
        out. Updates and parameters of fewer than two dimensions are not decayed.

    Raises:
        ConfigError: nothing trains, or `head_lr` is given and no part of the head trains.
    """
    groups: dict[str, dict[str, Any]] = {
        part + suffix: {"name": part + suffix, "params": [], "lr": lr, "weight_decay": decay}
        for part, lr in (("backbone", config.lr), ("head", config.head_lr or config.lr))
        for suffix, decay in (("", config.weight_decay), ("_no_decay", 0.0))
    }
    updates = update_ids(module)
    for parameter in module.parameters():
        if parameter.requires_grad:
            part = "head" if parameter in head else "backbone"
            suffix = "_no_decay" if id(parameter) in updates or parameter.ndim < 2 else ""
            groups[part + suffix]["params"].append(parameter)
    kept = [group for group in groups.values() if group["params"]]
    if not kept:
        raise ConfigError([f"no parameter of {type(module).__name__} requires a gradient."])
    if config.head_lr is not None and not any("head" in group["name"] for group in kept):
        problem = (
            f"head_lr={config.head_lr}: no head trains in {type(module).__name__}: its model has no"
            " get_classifier(), or the head is frozen. Give head_lr=null."
        )
        raise ConfigError([problem])
    return kept


def warmup_cosine(total_steps: int, warmup: float) -> Callable[[int], float]:
    """step -> fraction of the peak rate: linear to 1, then a half cosine to 0 at the end."""
    climb = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < climb:
            return (step + 1) / climb
        progress = (step - climb) / max(1, total_steps - climb)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def adamw(
    groups: list[dict[str, Any]], config: OptimConfig, total_steps: int, fused: bool = False
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """The optimizer of these groups and its schedule, to be stepped after each optimizer step."""
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused or None)

    def stay(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Not as the run did that wrote the checkpoint: it may have clipped, or had another precision."""
        return {**state, "param_groups": [{**g, "fused": fused or None} for g in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(stay)
    return optimizer, LambdaLR(optimizer, warmup_cosine(total_steps, config.warmup))


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
    """What `configure_optimizers` of a task returns: AdamW on what trains, its rate set at each step.

    Raises:
        ConfigError: the number of steps is not known; nothing trains.
    """
    steps = module.trainer.estimated_stepping_batches
    if math.isinf(steps):
        problem = (
            "trainer.max_epochs=-1: the learning rate falls to 0 at the last step, so the number"
            " of steps must be known. Give trainer.max_epochs or trainer.max_steps."
        )
        raise ConfigError([problem])
    groups = parameter_groups(module, head, config)
    optimizer, scheduler = adamw(groups, config, int(steps), may_be_fused(module.trainer, groups))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
