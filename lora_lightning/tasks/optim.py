"""OptimConfig: AdamW with warm-up and cosine decay, and which parameters get which rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lora_lightning.errors import ConfigError, did_you_mean
from lora_lightning.layers import update_ids


@dataclass
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); the rate is set anew at each step.

    Args:
        lr: peak learning rate of everything that trains but the head.
        head_lr: peak learning rate of the head; None means `lr`.
        weight_decay: not applied to updates, biases and normalization layers.
        warmup: fraction of all steps in which the rate climbs linearly to its peak; in the others
            it falls to 0 along a half cosine.
        betas: decay rates of AdamW's two running averages.

    Raises:
        ConfigError: one line for each bad option.
    """

    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        # A list from YAML becomes a plain tuple, which every checkpoint can hold.
        if isinstance(self.betas, Iterable) and not isinstance(self.betas, (str, Mapping)):
            self.betas = tuple(map(_numeric, self.betas))
        for name in ("lr", "head_lr", "weight_decay", "warmup"):
            setattr(self, name, _numeric(getattr(self, name)))
        problems = [
            _between("lr", self.lr, "above 0; 1e-4 to 1e-2 are usual"),
            self.head_lr is not None and _between("head_lr", self.head_lr, "above 0, or null for lr"),
            _from_zero("weight_decay", self.weight_decay, "of at least 0"),
            _from_zero("warmup", self.warmup, "of at least 0 and below 1", below=1),
            None
            if isinstance(self.betas, tuple)
            and len(self.betas) == 2
            and not any(_between("beta", b, "", below=1) for b in self.betas)
            else f"betas={self.betas!r}: give two numbers between 0 and 1, such as [0.9, 0.999].",
        ]
        if found := [p for p in problems if p]:
            raise ConfigError(found)

    @classmethod
    def problems(cls, options: Mapping[str, Any], prefix: str = "") -> list[str]:
        """Every problem of these options, unknown names included; empty when all is well.

        Args:
            prefix: what the names begin with where they are written, such as `optim.` on a command line.
        """
        known = [f.name for f in fields(cls)]
        problems = [
            f"{prefix}{name} is not an option of the optimizer.{did_you_mean(name, known)}"
            f" Options: {', '.join(known)}."
            for name in options
            if name not in known
        ]
        try:
            cls(**{name: value for name, value in options.items() if name in known})
        except ConfigError as error:
            problems += [f"{prefix}{problem}" for problem in error.problems]
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, fit for JSON and for `weights_only` loading."""
        return asdict(self)


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
    groups: list[dict[str, Any]], config: OptimConfig, total_steps: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """The optimizer of these groups and its schedule, to be stepped after each optimizer step."""
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    return optimizer, LambdaLR(optimizer, warmup_cosine(total_steps, config.warmup))


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
    optimizer, scheduler = adamw(parameter_groups(module, head, config), config, int(steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _numeric(value: Any) -> Any:
    """PyYAML takes 1e-3, without a point, for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _between(name: str, value: Any, allowed: str, below: float = math.inf) -> str | None:
    """A problem unless 0 < value < below."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if number and 0 < value < below else f"{name}={value!r}: give a number {allowed}."


def _from_zero(name: str, value: Any, allowed: str, below: float = math.inf) -> str | None:
    """A problem unless 0 <= value < below."""
    zero = value == 0 and not isinstance(value, bool)
    return None if zero else _between(name, value, allowed, below)
