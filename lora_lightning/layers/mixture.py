"""MixtureUpdate: a sum of updates that are done training, with weights that train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LowRankUpdate


class MixtureUpdate(LowRankUpdate):
    """Σᵢ wᵢ·Δᵢ of updates Δᵢ that do not train, w = softmax(m): the weights of X-LoRA (Buehler and Buehler
    2024, arXiv 2402.07148, section 2), here the same for every input, of each layer its own.

    The Δᵢ stand side by side in `lora_A` and `lora_B`. To whoever computes with it, it is an update of the
    sum of their ranks.

    Args:
        ranks: of each Δᵢ, 0 for one that has nothing in this place.
        **options: of LowRankUpdate, without a fixed part and DoRA.

    Attributes:
        lora_mixture: m, (len(ranks),); it begins at zero, equal weights. Alone it trains.
    """

    def __init__(self, weight: Tensor, slot: Slot, *, ranks: Sequence[int], **options: Any) -> None:
        super().__init__(weight, slot, rank=sum(ranks), **options)
        self.ranks = tuple(ranks)
        self.lora_mixture = nn.Parameter(self.lora_A.new_zeros(len(ranks)))
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)

    def trained(self) -> list[nn.Parameter]:
        return [self.lora_mixture]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lora_mixture" in self._parameters:
            nn.init.zeros_(self.lora_mixture)

    @property
    def makes_factors(self) -> bool:
        return True

    def weights(self) -> Tensor:
        """w, (len(ranks),): above 0, of sum 1."""
        return self.lora_mixture.softmax(0)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, weighted(self.slot, self.lora_B, self.weights(), self.ranks)


def weighted(slot: Slot, B: Tensor, weights: Tensor, ranks: Sequence[int]) -> Tensor:
    """B with the columns of each term times its weight."""
    of_each = weights.repeat_interleave(torch.tensor(ranks, device=weights.device), output_size=sum(ranks))
    if not slot.transposed:
        return B * of_each
    return B * of_each.repeat(slot.groups).view(-1, *[1] * (B.dim() - 1))  # (groups·r, ...)
