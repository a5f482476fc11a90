"""The rank and alpha of each layer that is adapted."""

from __future__ import annotations

import math

from torch import nn

from lora_lightning.config import LoRAConfig
from lora_lightning.planning.patterns import lookup
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.planning.structure import Target
from lora_lightning.utils.names import submodule
from lora_lightning.utils.pattern_kinds import is_name


def ranked(
    backbone: nn.Module,
    config: LoRAConfig,
    chosen: list[Target],
    problems: list[str],
) -> list[LayerPlan]:
    """Rank, alpha and size of each chosen layer; with patterns checked against the names. A rank for all
    layers is capped at a layer's smaller side; one that is given to a layer by its name is not."""
    targets = {t.name: t for t in chosen}
    rank_of = lookup("rank_pattern", config.rank_pattern, targets, problems)
    alpha_of = lookup("alpha_pattern", config.alpha_pattern, targets, problems)
    layers: list[LayerPlan] = []
    small: dict[str, dict[str, int]] = {}
    for name, target in targets.items():
        shape, side = target.shape, target.slot.highest_rank(target.shape)
        key, asked = rank_of(name) or ("", config.rank)
        if asked > side and is_name(key) and key:
            small.setdefault(key, {})[name] = side
        rank = min(asked, side)
        _, alpha = alpha_of(name) or ("", 2 * rank if config.alpha is None else config.alpha)
        parameters = sum(math.prod(factor) for factor in target.slot.factors(shape, rank))
        parameters += shape[0] if config.use_dora else 0
        kind = type(submodule(backbone, target.module)).__name__
        layers.append(
            LayerPlan(
                name, target.module, target.slot_name, kind, shape, rank, alpha, parameters,
                asked if asked > rank else None, config.fixed_rank(rank),
            )
        )  # fmt: skip
    for key, sides in small.items():
        name, side = min(sides.items(), key=lambda item: item[1])
        others = f" and {len(sides) - 1} more" if len(sides) > 1 else ""
        problems.append(
            f"rank_pattern[{key!r}]={config.rank_pattern[key]} is above the smaller side, {side}, of "
            f"{name}{others}: give at most {side}."
        )
    return layers
