"""Rates: the rate and the decay of each part of what trains, as options that check themselves. Loads nothing
heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from lora_lightning.utils.checks import Options
from lora_lightning.utils.marks import Null, above, at_least, between


@dataclass
class Rates(Options):
    """The rate of each part of what trains, and its decay.

    Args:
        lr: peak learning rate of everything that trains but the head.
        head_lr: peak learning rate of the head; None means `lr`.
        weight_decay: not applied to updates, biases and normalization layers.
        layer_decay: each block's rate is this times that of the block behind it, down to what stands before
            the blocks (Clark et al. 2020, arXiv 2003.10555; BEiT, arXiv 2106.08254); the head keeps its own.
            None is the same rate for all.
        lora_plus: LoRA+'s λ: the rate of each `lora_B` is this times that of its `lora_A` (Hayou et al. 2024,
            arXiv 2402.12354, section 3: η_B = λ·η_A). None is the same rate for both.

    Raises:
        ConfigError: one line for each bad option.
    """

    owner = "param_groups"

    lr: Annotated[float, above(0, note="1e-4 to 1e-2 are usual")] = 1e-3
    head_lr: Annotated[float | None, above(0), Null("lr")] = None
    weight_decay: Annotated[float, at_least(0)] = 0.0
    layer_decay: Annotated[float | None, between(0.01, 1, note="0.65 to 0.9 are usual"), Null("none")] = None
    lora_plus: Annotated[
        float | None, at_least(1, note="2 to 20 are usual, 16 is the paper's"), Null("none")
    ] = None

    @classmethod
    def plain(cls, name: str, value: Any) -> Any:
        """PyYAML takes 1e-3, without a point, for a text."""
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value
