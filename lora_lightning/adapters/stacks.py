"""Stacks: the factors of one slot for each sample of a batch, as the batched branches read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.adapters.mixed_samples import MixedSamples
from lora_lightning.kernels.half import shared_out
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.linear import LoRALinear
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LowRankUpdate


@dataclass
class Stack:
    """One slot's updates of the adapters of a batch, of one rank, for each sample.

    Attributes:
        A: (n, groups, R, columns of A), in float16 with `kernels.half.divisors` taken out.
        B: (n, groups, out / groups, R) times the scaling and those; transposed (n, groups, R, columns); of a
            linear layer (n, R, out).
        updates: of each adapter in `samples.distinct`, None where it has none here; none at all where
            nothing but A and B is asked for.
        factors: DoRA's, (n, out), 1 for samples without; None when no adapter has them.
    """

    slot: Slot
    A: Tensor
    B: Tensor
    updates: Sequence[LowRankUpdate | None] = ()
    factors: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[2]


def stacked(
    layer: LoRALayer,
    updates: Sequence[LowRankUpdate | None],
    samples: MixedSamples,
    dtype: torch.dtype | None = None,
) -> Stack:
    """The updates padded to the largest rank and gathered by sample.

    Args:
        updates: of each adapter in `samples.distinct`, None where it has none here.
        dtype: of the products; None for an embedding, whose branch has A's.
    """
    some = [u for u in updates if u is not None]
    slot, rank = some[0].slot, max(u.total_rank for u in some)
    dtype = dtype or some[0].lora_A.dtype
    parts = [None if u is None else _factors(layer, u, rank, dtype) for u in updates]
    empty = [torch.zeros_like(factor) for factor in next(p for p in parts if p is not None)]
    A, B = (samples.by_sample([(empty if p is None else p)[i] for p in parts]) for i in (0, 1))
    if dtype != torch.float16:
        B = _scaled(B, updates, samples)  # one product for all: it costs less than one for each
    if all(u.lora_magnitude is None for u in some):
        return Stack(slot, A, B, updates)
    weight = slot.of(layer.base_weight(slot.parameter))
    factors = [None if u is None else u.row_factors(weight) for u in updates]
    known = next(f for f in factors if f is not None)
    return Stack(
        slot, A, B, updates, samples.by_sample([torch.ones_like(known) if f is None else f for f in factors])
    )


def _scaled(B: Tensor, updates: Sequence[LowRankUpdate | None], samples: MixedSamples) -> Tensor:
    """B times the scaling of each sample's update, in its own memory."""
    scalings = [1.0 if u is None else u.scaling for u in updates]
    if len({*scalings}) == 1:
        return B.mul_(scalings[0])
    each = B.new_tensor(scalings)[samples.index(B.device)]
    return B.mul_(each.view(-1, *[1] * (B.dim() - 1)))


def _factors(layer: LoRALayer, update: LowRankUpdate, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B, in float16 s·B, as in a stack, with zeros up to the rank."""
    slot, missing = update.slot, rank - update.total_rank
    A, B = update.factors()
    if dtype == torch.float16:
        A, B, _ = shared_out(A, B, update.scaling, dtype, slot.transposed)
    A, B = shaped(layer, slot, A[None], B[None])
    A, along = _padded_rank(A[0], missing), layer.mixin_class is LoRALinear or slot.transposed
    return A, _padded_rank(B[0], missing) if along else F.pad(B[0], [0, missing])


def shaped(layer: LoRALayer, slot: Slot, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of n updates, (n, *shape of the parameter), as in a stack."""
    A = A.reshape(len(A), slot.groups, -1, math.prod(A.shape[2:]))
    if slot.transposed:
        return A, B.reshape(*A.shape[:3], -1)
    if layer.mixin_class is LoRALinear:
        return A, B.mT
    return A, B.reshape(len(B), slot.groups, -1, A.shape[2])


def _padded_rank(factor: Tensor, missing: int) -> Tensor:
    """(..., rank, columns), with as many rows of zeros as are missing."""
    return F.pad(factor, [0, 0, 0, missing]) if missing else factor
