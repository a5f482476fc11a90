"""Ranks from what data say of each layer: within a budget of parameters, or by a share of the energy."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def by_budget(
    shares: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    highest: Mapping[str, int],
    budget: int,
) -> dict[str, int]:
    """The ranks that explain most, over all layers, for this many parameters.

    With ξ_ij the share of layer i's variance that its component j explains, the ranks r maximize
    Σ_i Σ_{j ≤ r_i} ξ_ij subject to Σ_i r_i·c_i ≤ budget. Since ξ_i falls with j, taking the components by
    ξ/c, largest first, does it up to the last one. Paischer et al. 2024 (arXiv 2410.07170, section 3) take
    them by ξ at a given sum of ranks; the prices are what a budget of parameters adds, as in He et al. 2025
    (GoRA, arXiv 2502.12171). Every layer has a rank of at least 1.

    Args:
        shares: ξ by layer, falling.
        costs: parameters of a rank of 1.
        highest: the most that a layer may have.
        budget: at least the sum of the costs.
    """
    ranks = dict.fromkeys(shares, 1)
    left = budget - sum(costs[name] for name in shares)
    waiting: list[tuple[float, int, str]] = []

    def offer(order: int, name: str) -> None:
        rank = ranks[name]
        if rank < min(highest[name], len(shares[name])) and shares[name][rank] > 0:
            heapq.heappush(waiting, (-shares[name][rank] / costs[name], order, name))

    for order, name in enumerate(shares):
        offer(order, name)
    while waiting:
        _, order, name = heapq.heappop(waiting)
        if costs[name] <= left:  # else the layer has what it can; cheaper ones go on
            ranks[name] += 1
            left -= costs[name]
            offer(order, name)
    return ranks


def by_energy(shares: Sequence[float], highest: int, share: float) -> int:
    """The smallest rank whose components explain this share, between 1 and `highest`."""
    explained = 0.0
    for rank, part in enumerate(shares, 1):
        explained += part
        if explained >= share or rank == highest:
            return rank
    return max(1, min(highest, len(shares)))


def explained(shares: Sequence[float], rank: int) -> float:
    """The share that a rank explains, at most 1."""
    return min(1.0, sum(shares[:rank]))
