"""Which form and rank each layer has, over the whole model: by the least error for a cost, never one
ratio for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_lightning.compression.form import Rank

HALVINGS = 60


@dataclass(frozen=True)
class Choice:
    """A form and rank of one layer.

    Attributes:
        parameters: of its weights.
        flops: in all batches; None without data.
        lost: the share of the layer's output that is lost, ‖(W − Ŵ)X‖² / ‖WX‖².
        cost: what the budget counts of it.
    """

    form: str
    rank: Rank
    parameters: int
    flops: int | None
    lost: float
    cost: int


def worthwhile(choices: Iterable[Choice]) -> list[Choice]:
    """Those of which no other costs as little and loses less, the cheapest first."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.lost)):
        if not found or choice.lost < found[-1].lost:
            found.append(choice)
    return found


def by_energy(choices: Mapping[str, list[Choice]], energy: float) -> dict[str, Choice]:
    """Of each layer the cheapest that keeps this share of its output, where one does."""
    kept = {n: next((c for c in some if c.lost <= 1 - energy), None) for n, some in choices.items()}
    return {n: choice for n, choice in kept.items() if choice is not None}


def least(choices: Mapping[str, list[Choice]], dense: Mapping[str, int]) -> int:
    """What the cheapest choices cost."""
    return sum(min([dense[n], *(c.cost for c in some)]) for n, some in choices.items())


def by_budget(
    choices: Mapping[str, list[Choice]], dense: Mapping[str, int], budget: int
) -> dict[str, Choice]:
    """The choices with the least loss in all whose costs fit; a layer without one stays dense.

    The price of cost is halved in on (Lagrange), and what the budget has left is spent on what gains most.

    Args:
        choices: of each layer, as `worthwhile` orders them.
        dense: what each costs as it is.
        budget: at least `least`.
    """
    low, high = -40.0, 10.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _cost(_at(choices, dense, 10**middle), dense) <= budget:
            high = middle
        else:
            low = middle
    chosen = _at(choices, dense, 10**high)
    while better := _best_step(choices, dense, chosen, budget - _cost(chosen, dense)):
        name, choice = better
        if choice is None:
            del chosen[name]
        else:
            chosen[name] = choice
    return chosen


def _at(choices: Mapping[str, list[Choice]], dense: Mapping[str, int], price: float) -> dict[str, Choice]:
    """The best of each layer at a price of cost; a layer that is best dense is absent."""
    found = {}
    for name, some in choices.items():
        best = min(some, key=lambda c: c.lost + price * c.cost, default=None)
        if best is not None and best.lost + price * best.cost < price * dense[name]:
            found[name] = best
    return found


def _cost(chosen: Mapping[str, Choice], dense: Mapping[str, int]) -> int:
    return sum(chosen[n].cost if n in chosen else cost for n, cost in dense.items())


def _best_step(
    choices: Mapping[str, list[Choice]], dense: Mapping[str, int], chosen: Mapping[str, Choice], room: int
) -> tuple[str, Choice | None] | None:
    """The layer and its better choice, None for dense, that gains most for its cost within what is left."""
    steps: list[tuple[float, str, Choice | None]] = []
    for name, now in chosen.items():
        for better in choices[name]:
            if now.cost < better.cost <= now.cost + room and better.lost < now.lost:
                steps.append(((now.lost - better.lost) / (better.cost - now.cost), name, better))
        if 0 <= dense[name] - now.cost <= room:
            steps.append((now.lost / max(1, dense[name] - now.cost), name, None))
    if not steps:
        return None
    _, name, choice = max(steps, key=lambda step: step[0])
    return name, choice
