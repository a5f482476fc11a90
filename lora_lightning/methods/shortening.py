"""Ranks for many updates at once, by a rank, an energy or a budget, and what was lost in each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.layers.factors import put_sides
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.methods.truncation import Decomposed, decomposed_product, rank_by_energy, ranks_by_budget
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.utils.marks import Bounds, above, at_least
from lora_lightning.utils.names import family
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import ROOT, format_table, span, truncate_list

SHARE: Bounds = above(0, most=1, note="0.95 keeps 95 % of Σσ²")
Rank = Annotated[int | None, at_least(1)]
Energy = Annotated[float | None, SHARE]


def one_limit(**limits: object) -> str | None:
    """Why not exactly one of these options is given, or None when it is."""
    given = [f"{name}={value!r}" for name, value in limits.items() if value is not None]
    names = f"{', '.join([*limits][:-1])} or {[*limits][-1]}"
    if len(given) == 1:
        return None
    return f"{' and '.join(given) if given else 'what to keep'}: give one of {names}."


@dataclass(frozen=True)
class Approximated:
    """A layer's update by one of lower rank.

    Attributes:
        rank: 0 is no update: the layer is left as the base has it.
        before: the rank before; None of a matrix that was no product.
        norm: Frobenius norm of what is approximated.
        error: ‖difference‖ / norm (Frobenius).
        parameters: of the new factors.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    before: int | None
    norm: float
    error: float
    parameters: int


@dataclass(frozen=True)
class Approximation:
    """What was made of an adapter's updates, or of a fine-tuned model's changes; `print` it for a table.

    Attributes:
        layers: in the model's order.
        notes: what else there is to tell, a line each.
    """

    layers: tuple[Approximated, ...]
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> dict[str, float]:
        """The relative error of each layer by its name."""
        return {layer.name: layer.error for layer in self.layers}

    @property
    def error(self) -> float:
        """The relative error of all updates together (Frobenius)."""
        whole = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.norm * layer.error for layer in self.layers)) / whole if whole else 0.0

    @property
    def parameters(self) -> int:
        """Of all updates."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        families: dict[str, list[Approximated]] = {}
        for layer in self.layers:
            families.setdefault(family(layer.name) or ROOT, []).append(layer)
        rows = [_row(name, layers) for name, layers in families.items()]
        total = ("all", len(self.layers), "", "", "", f"{100 * self.error:.2f}", f"{self.parameters:,}")
        header = ("layers", "count", "weight", "rank", "before", "error %", "parameters")
        shown = [i for i, name in enumerate(header) if name != "before" or any(row[i] for row in rows)]
        table = format_table([header[i] for i in shown], [[r[i] for i in shown] for r in [*rows, total]])
        return "\n".join([table, *self.notes])


@dataclass(frozen=True)
class Shortened:
    """An adapter's updates by shorter ones.

    Attributes:
        layers: the plan of what is left.
        factors: (groups, m, r) and (groups, r, k) of each layer, with the scaling.
        told: what was lost.
    """

    layers: list[LayerPlan]
    factors: dict[str, tuple[Tensor, Tensor]]
    told: Approximation


def _row(name: str, layers: list[Approximated]) -> tuple[object, ...]:
    shapes = {"×".join(map(str, layer.shape)) for layer in layers}
    return (
        name,
        len(layers),
        shapes.pop() if len(shapes) == 1 else "",
        span([layer.rank for layer in layers], "{:d}"),
        span([layer.before for layer in layers if layer.before is not None], "{:d}"),
        span([100 * layer.error for layer in layers], "{:.2f}"),
        f"{sum(layer.parameters for layer in layers):,}",
    )


def chosen_ranks(
    wholes: Mapping[str, Decomposed],
    costs: Mapping[str, int],
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> dict[str, int]:
    """The rank that each matrix keeps, by the one of the limits that is given; never one that holds nothing.

    Args:
        costs: parameters of one rank of each.
    """
    if budget is not None:
        return ranks_by_budget(wholes, costs, budget)
    whole = {name: rank_by_energy(one, 1.0 if energy is None else energy) for name, one in wholes.items()}
    return whole if rank is None else {name: min(rank, most) for name, most in whole.items()}


def shortened(
    config: LoRAConfig,
    layers: Sequence[LayerPlan],
    slots: Mapping[str, Slot],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    rank: int | None,
    energy: float | None,
    budget: int | None,
) -> Shortened:
    """The best updates of lower rank in the place of an adapter's, by the one limit that is given.

    Args:
        slots: of each layer, by its name.
        factors: of each layer's whole update, (groups, m, r) and (groups, r, k), with its scaling.
        rank, energy, budget: as of `shrink`.

    Raises:
        ConfigError: the adapter has DoRA, or the budget pays for no update.
        UserError: every update is zero.
    """
    if config.use_dora:
        raise ConfigError([
            "use_dora=True: DoRA's update m·(W + s·B·A)/‖W + s·B·A‖ - W is no product of two thin matrices. "
            "Make plain LoRA of it: lora_lightning.eject(model, merged=True), and then "
            "lora_lightning.extract_lora(base, model, energy=…)."
        ])  # fmt: skip
    pairs = working(factors.items(), "shrinking", "layers")
    wholes = {name: decomposed_product(*pair) for name, pair in pairs}
    costs = {p.name: cost_of(slots[p.name], p.shape) for p in layers}
    ranks = chosen_ranks(wholes, costs, rank, energy, budget)
    if not any(one.norm for one in wholes.values()):
        raise UserError("every update is zero: train the adapter before it is shrunk.")
    if not any(ranks.values()):
        least = min(cost for name, cost in costs.items() if wholes[name].norm)
        raise ConfigError([
            f"budget={budget}: one rank of the smallest layer takes {least} parameters: give that or more."
        ])  # fmt: skip
    told = [
        approximated(p.name, p.shape, wholes[p.name], ranks[p.name], costs[p.name], _rank_of(factors[p.name]))
        for p in layers
    ]
    left_out = [p.name for p in layers if not ranks[p.name]]
    notes = (f"left as the base has them: {truncate_list(left_out)}",) if left_out else ()
    return Shortened(
        [shortened_plan(p, slots[p.name], ranks[p.name], config) for p in layers if ranks[p.name]],
        {name: whole.factors(ranks[name]) for name, whole in wholes.items()},
        Approximation(tuple(told), notes),
    )


def plainly(config: LoRAConfig, layers: Sequence[LayerPlan]) -> LoRAConfig:
    """The configuration of an adapter that was trained and shrunk to these layers, without what says how it
    began; their names and ranks are to be put into it."""
    return replace(
        config,
        rank=max((p.rank for p in layers), default=config.rank),
        alpha=None,
        exclude_modules=None,
        init="default",
        restarts=0,
        budget=None,
    )


def _rank_of(factors: tuple[Tensor, Tensor]) -> int:
    return factors[0].shape[2]


def cost_of(slot: Slot, shape: tuple[int, ...]) -> int:
    """Parameters of one rank of an update."""
    return sum(math.prod(factor) for factor in slot.factors(shape, 1))


def shortened_plan(layer: LayerPlan, slot: Slot, rank: int, config: LoRAConfig) -> LayerPlan:
    """The plan of a layer at another rank, with the scaling that it has."""
    scaling = config.scaling(layer.rank, layer.alpha)
    alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
    size = rank * cost_of(slot, layer.shape)
    return replace(layer, rank=rank, alpha=alpha, parameters=size, asked=None, fixed=0, mixed=())


@torch.no_grad()
def as_factors(
    left: Tensor, right: Tensor, slot: Slot, shape: tuple[int, ...], scaling: float
) -> tuple[Tensor, Tensor]:
    """A and B, of the shapes of `Slot.factors`, with s·B·A = left·right; the scaling is shared out between
    them. The inverse of `LowRankUpdate.thin_factors` where there is no fixed part.

    Args:
        left, right: (groups, m, r) and (groups, r, k).
        shape: of the weight, or of its rows.
    """
    A, B = (left.new_empty(factor) for factor in slot.factors(shape, left.shape[2]))
    put_sides(slot, left / math.sqrt(scaling), right / math.sqrt(scaling), A, B)
    return A, B


def write_update(update: LowRankUpdate, left: Tensor, right: Tensor) -> None:
    """Let an update without a fixed part be left·right, of its own rank."""
    root = math.sqrt(update.scaling)
    put_sides(update.slot, left / root, right / root, update.lora_A.data, update.lora_B.data)


def approximated(
    name: str, shape: tuple[int, ...], whole: Decomposed, rank: int, cost: int, before: int | None = None
) -> Approximated:
    """What keeping this rank costs and loses."""
    return Approximated(name, shape, rank, before, whole.norm, whole.error(rank), rank * cost)
