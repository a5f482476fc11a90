"""The optimizer of a task and the schedule of its rate."""

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

from lora_lightning.adapters.restarts import restarts_of
from lora_lightning.errors import ConfigError
from lora_lightning.methods.optimizers import groups_of
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.tasks.optimizers import KINDS, class_of, options_for
from lora_lightning.tasks.schedules import needs_an_end, schedule_of


def optimizer_of(
    groups: list[dict[str, Any]],
    config: OptimConfig,
    total_steps: float,
    fused: bool = False,
    module: nn.Module | None = None,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer of these groups and its schedule, to be stepped after each optimizer step.

    Args:
        module: where the groups are from, for optimizers that know updates.

    Raises:
        ConfigError: the optimizer is for updates, and the module has none.
        LibraryError: the optimizer's library is missing or too old.
    """
    options = options_for(config.name, vars(config))
    if config.name == "muon":  # it is for hidden matrices
        groups = [{**g, "use_fallback": g["name"].startswith("head")} for g in groups]
    if KINDS[config.name].fused:
        options["fused"] = fused or None
    if KINDS[config.name].for_updates:
        options["module"] = module
    optimizer = class_of(config.name)(groups, lr=config.lr, **options)

    def stay(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Not as the run did that wrote the checkpoint: it may have clipped, or had another precision."""
        return {**state, "param_groups": [{**g, "fused": fused or None} for g in state["param_groups"]]}

    if KINDS[config.name].fused:
        optimizer.register_load_state_dict_pre_hook(stay)
    restarts = 0 if module is None else restarts_of(module)
    return optimizer, LambdaLR(optimizer, schedule_of(config.rate_schedule, total_steps, restarts))


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
    if math.isinf(steps) and (needs_an_end(config.rate_schedule) or restarts_of(module)):
        problem = (
            "trainer.max_epochs=-1: the learning rate follows the number of steps, so it must be known. Give"
            " trainer.max_epochs or trainer.max_steps, or schedule=constant schedule.warmup=0."
        )
        raise ConfigError([problem])
    groups = groups_of(module, head, config)
    sharded = any(type(p) is not nn.Parameter for group in groups for p in group["params"])
    if sharded and KINDS[config.name].library != "torch":
        raise ConfigError([
            f"optim.name={config.name}: it takes no parameters that are sharded over processes; take adamw, "
            "or trainer=ddp."
        ])  # fmt: skip
    fused = may_be_fused(module.trainer, groups)
    optimizer, scheduler = optimizer_of(groups, config, steps, fused, module)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
