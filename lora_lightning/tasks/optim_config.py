"""OptimConfig: the optimizer's options, which validate themselves. Loads nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lora_lightning.errors import ConfigError, did_you_mean


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
