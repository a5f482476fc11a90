"""Sums of low-rank updates: side by side, shortened by SVD, or entry by entry (TIES, DARE)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.methods.truncation import decomposed, decomposed_product
from lora_lightning.planning.plan import LayerPlan


@dataclass
class Sum:
    """What is added up in one place of the model.

    Attributes:
        layer: the plan of one of the adapters for it.
        side: the highest rank that its matrix can have.
        terms: number of the adapter, and its update as (groups, m, r) times (groups, r, k), which holds
            its scaling.
    """

    layer: LayerPlan
    side: int
    terms: list[tuple[int, Tensor, Tensor]]


def rank_of(total: Sum, rank: int | None) -> int:
    """The rank asked for, or the highest of the terms, as far as the matrix has it."""
    return min(total.side, rank or max(right.shape[1] for _, _, right in total.terms))


def side_by_side(total: Sum, weights: list[float]) -> tuple[Tensor, Tensor]:
    """Σ w·Δ as one product, whose rank is the sum of the ranks."""
    left = torch.cat([weights[i] * left for i, left, _ in total.terms], dim=2)
    return left, torch.cat([right for _, _, right in total.terms], dim=1)


def shortened(matrix: Tensor | tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of this rank, by groups, and the relative error; of a dense matrix, or of a product
    of thin factors, which is never formed."""
    whole = decomposed(matrix, rank) if isinstance(matrix, Tensor) else decomposed_product(*matrix)
    return *whole.factors(rank), whole.error(rank)


@torch.no_grad()
def dense(
    sums: dict[str, Sum], weights: list[float], method: str, density: float, seed: int
) -> dict[str, Tensor]:
    """The merged updates, (groups, m, k), before they are made thin."""
    sparse: Callable[[int, Tensor], Tensor]
    if method == "ties":
        thresholds = {i: _threshold(sums, i, density) for i in range(len(weights))}

        def sparse(i: int, delta: Tensor) -> Tensor:
            return delta * (delta.abs() >= thresholds[i])

    else:
        generator = torch.Generator().manual_seed(seed)

        def sparse(i: int, delta: Tensor) -> Tensor:
            kept = torch.rand(delta.shape, generator=generator) < density
            return delta * kept.to(delta.device) / density

    merged = {}
    for name, total in sums.items():
        # an adapter may have several terms in one place: rows of a weight that another updates whole
        deltas: dict[int, Tensor] = {}
        for i, left, right in total.terms:
            deltas[i] = deltas[i] + left @ right if i in deltas else left @ right
        kept = torch.stack([sparse(i, delta) for i, delta in deltas.items()])
        w = kept.new_tensor([weights[i] for i in deltas]).view(-1, 1, 1, 1)
        if method == "dare_linear":
            merged[name] = (w * kept).sum(0)
        else:
            sign = kept.sum(0).sign()
            agree = (kept.sign() == sign) & (sign != 0)
            merged[name] = (w * kept * agree).sum(0) / agree.sum(0).clamp_min(1)
    return merged


def _threshold(sums: dict[str, Sum], adapter: int, density: float) -> Tensor:
    """The smallest magnitude that stays of this adapter's updates, over all layers."""
    deltas = []
    for total in sums.values():
        products = [left @ right for i, left, right in total.terms if i == adapter]
        deltas += [torch.stack(products).sum(0).abs().flatten()] if products else []
    magnitudes = torch.cat(deltas) if deltas else torch.zeros(1)
    keep = max(1, round(density * magnitudes.numel()))
    return magnitudes.kthvalue(magnitudes.numel() - keep + 1).values
