"""The rank and alpha of each layer that is adapted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from lora_lightning.config import EVEN, LoRAConfig
from lora_lightning.planning.patterns import lookup
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.planning.structure import Target
from lora_lightning.utils.names import submodule
from lora_lightning.utils.pattern_kinds import is_name


@dataclass(frozen=True)
class Decided:
    """Ranks that data have decided, by the names of the layers; those that `rank_pattern` names are not among
    them.

    Attributes:
        explained: the share of the variance that each explains.
        how: in words, for the plan.
    """

    ranks: Mapping[str, int]
    explained: Mapping[str, float]
    how: str

    def within(self, backbone: str) -> Decided:
        """The same by names in the backbone."""
        start = f"{backbone}." if backbone else ""
        ranks = {name.removeprefix(start): rank for name, rank in self.ranks.items()}
        return replace(
            self, ranks=ranks, explained={n.removeprefix(start): v for n, v in self.explained.items()}
        )


@dataclass(frozen=True)
class Shared:
    """What there is to share out among the layers whose ranks nobody gives.

    Attributes:
        costs: parameters of a rank of 1, by layer.
        sides: the highest rank, by layer.
        budget: parameters for all of them.
        even: the highest rank that all could have.
    """

    costs: Mapping[str, int]
    sides: Mapping[str, int]
    budget: int
    even: int

    @property
    def least(self) -> int:
        """What a rank of 1 everywhere costs."""
        return sum(self.costs.values())

    def named(self, start: str) -> Shared:
        """The same by names that begin so."""
        costs = {start + name: cost for name, cost in self.costs.items()}
        return replace(self, costs=costs, sides={start + name: side for name, side in self.sides.items()})


def shared_out(config: LoRAConfig, targets: Mapping[str, Target], total: int) -> Shared:
    """What `budget` comes to for these targets: a number of parameters, a share of the model's, or by default
    what a rank of `EVEN` would cost; less what the layers named in `rank_pattern` take of it.

    Args:
        total: parameters of the model.
    """
    rank_of = lookup("rank_pattern", config.rank_pattern, targets, [])
    costs, sides, taken = {}, {}, 0
    for name, target in targets.items():
        cost, side = cost_of(target), target.slot.highest_rank(target.shape)
        taken += target.shape[0] if config.use_dora else 0
        if named := rank_of(name):
            taken += cost * min(named[1], side)
        else:
            costs[name], sides[name] = cost, side

    def price(rank: int) -> int:
        return sum(cost * min(rank, sides[name]) for name, cost in costs.items())

    if config.budget is None:
        return Shared(costs, sides, price(EVEN), EVEN)
    budget = math.floor(config.budget * total if config.budget < 1 else config.budget) - taken
    even = 1
    while even < max(sides.values(), default=1) and price(even + 1) <= budget:
        even += 1
    return Shared(costs, sides, budget, even)


def cost_of(target: Target) -> int:
    """Parameters of a rank of 1."""
    return sum(math.prod(factor) for factor in target.slot.factors(target.shape, 1))


def ranked(
    backbone: nn.Module,
    config: LoRAConfig,
    chosen: list[Target],
    problems: list[str],
    total: int,
    decided: Decided | None,
) -> list[LayerPlan]:
    """Rank, alpha and size of each chosen layer; with patterns checked against the names. A rank for all
    layers is capped at a layer's smaller side; one that is given to a layer by its name is not.

    Args:
        total: parameters of the model.
        decided: by data; without them layers that wait for data have an even rank.
    """
    targets = {t.name: t for t in chosen}
    rank_of = lookup("rank_pattern", config.rank_pattern, targets, problems)
    alpha_of = lookup("alpha_pattern", config.alpha_pattern, targets, problems)
    even = _even(config, targets, total, problems)
    share = decided.explained if decided else {}
    layers: list[LayerPlan] = []
    small: dict[str, dict[str, int]] = {}
    for name, target in targets.items():
        shape, side = target.shape, target.slot.highest_rank(target.shape)
        key, asked = rank_of(name) or ("", decided.ranks.get(name, even) if decided else even)
        if asked > side and is_name(key) and key:
            small.setdefault(key, {})[name] = side
        rank = min(asked, side)
        _, alpha = alpha_of(name) or (
            "",
            config.default_alpha(rank) if config.alpha is None else config.alpha,
        )
        parameters = cost_of(target) * rank
        parameters += shape[0] if config.use_dora else 0
        kind = type(submodule(backbone, target.module)).__name__
        layers.append(
            LayerPlan(
                name, target.module, target.slot_name, kind, shape, rank, alpha, parameters,
                asked if asked > rank else None, config.fixed_rank(rank), explained=share.get(name),
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


def _even(config: LoRAConfig, targets: Mapping[str, Target], total: int, problems: list[str]) -> int:
    """The rank of a layer that neither a pattern nor data have given one."""
    if isinstance(config.rank, int):
        return config.rank
    if config.rank != "auto":
        return EVEN
    shared = shared_out(config, targets, total)
    if shared.costs and shared.budget < shared.least:
        problems.append(
            f"budget={config.budget}: {len(shared.costs)} layers of rank 1 take {shared.least:,} parameters, "
            f"and there are {max(0, shared.budget):,} for them: give at least "
            f"{_needed(config, shared)}, or fewer layers."
        )
    return shared.even


def _needed(config: LoRAConfig, shared: Shared) -> str:
    """The least budget, as a number of parameters."""
    assert config.budget is not None
    return (
        f"{shared.least} more than the layers of rank_pattern take"
        if config.rank_pattern
        else f"{shared.least}"
    )
