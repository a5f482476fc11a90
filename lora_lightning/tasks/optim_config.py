"""OptimConfig: the optimizer's options, which check themselves. Loads nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from lora_lightning.utils.checks import Options, fields_of
from lora_lightning.utils.marks import Null, above, at_least, listed, number


@dataclass
class OptimConfig(Options):
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

    owner = "the optimizer"

    lr: Annotated[float, above(0, note="1e-4 to 1e-2 are usual")] = 1e-3
    head_lr: Annotated[float | None, above(0), Null("lr")] = None
    weight_decay: Annotated[float, at_least(0)] = 0.0
    warmup: Annotated[float, at_least(0, below=1)] = 0.1
    betas: Annotated[
        tuple[float, float],
        listed("two numbers between 0 and 1, such as [0.9, 0.999]", number(above(0, below=1)), count=2),
    ] = (0.9, 0.999)

    @classmethod
    def of(cls, given: OptimConfig | Mapping[str, Any] | None) -> OptimConfig:
        """What a task was given, which may be a plain mapping, or None for the defaults."""
        return given if isinstance(given, OptimConfig) else cls(**(given or {}))

    @classmethod
    def plain(cls, name: str, value: Any) -> Any:
        """Numbers, and a tuple of the list that YAML has."""
        if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
            return tuple(map(_numeric, value))
        return _numeric(value)


def _numeric(value: Any) -> Any:
    """PyYAML takes 1e-3, without a point, for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


OptimOptions = Annotated[OptimConfig | Mapping[str, Any] | None, fields_of(OptimConfig)]
