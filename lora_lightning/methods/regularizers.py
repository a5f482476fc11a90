"""Terms R of the objective L + λ·R, each of the updates, of trained values or of outputs alone; when they are
taken and added to a loss is elsewhere.

With an update ΔW = s·B·A of a layer, A of r rows, B of r columns (of each group of a convolution, whose terms
are summed up), and R the sum over all layers:

    frobenius   ‖ΔW‖²_F = s²·tr(BᵀB · AAᵀ), of r × r matrices alone: no matrix of W's size is formed
    l2          ½·s·(‖A‖²_F + ‖B‖²_F), which is at least the nuclear norm ‖ΔW‖_*, and equal to it at its
                least over all factors of the same product (Srebro et al. 2004, "Maximum-margin matrix
                factorization", lemma 1): it drives the rank down
    orthogonal  Σ_{i≠j} (AAᵀ)²_ij + (BᵀB)²_ij: AdaLoRA's ‖AAᵀ − I‖² + ‖BᵀB − I‖² (Zhang et al. 2023,
                arXiv 2303.10512, equation 4) without the diagonals, which would drive B away from the zero
                that it begins with and fix the size of the update; AdaLoRA has singular values for that
    heads       ½·‖w − w⁰‖², w what trains in full inside the backbone: heads, norms, biases (L2-SP, Li et al.
                2018, arXiv 1802.01483, section 3)
    outputs     ‖f(x; W + ΔW) − f(x; W)‖² / ‖f(x; W)‖² on the batches of the training, the mean over the
                outputs: learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282), which asks for no
                data of the source. Its distance is between softened probabilities, whose limit for high
                temperatures is the squared one of logits (Hinton et al. 2015, arXiv 1503.02531, section
                2.1); which outputs are logits no model says

A fixed part belongs to the ΔW of "frobenius", ΔW = s·(B·A + F_B·F_A); the other two are of A and B, which
train. With DoRA ΔW is the update of the direction; the magnitudes are free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_lightning.kernels.common import without_autocast
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LowRankUpdate

LEAST = 1e-12  # of the square of the base's outputs, which may be zero where a head begins at zero


class Grams(NamedTuple):
    """The inner products within the factors of updates of one shape.

    Attributes:
        A: A·Aᵀ, (updates, groups, r, r), of what trains.
        B: Bᵀ·B, the same.
        whole: both of the whole update, with its fixed part.
        scaling: s.
    """

    A: Tensor
    B: Tensor
    whole: tuple[Tensor, Tensor]
    scaling: float


def frobenius(grams: Grams) -> Tensor:
    """s²·tr(BᵀB · AAᵀ) of the whole update, summed up."""
    A, B = grams.whole
    return grams.scaling**2 * (A * B).sum()


def l2(grams: Grams) -> Tensor:
    """½·s·(‖A‖² + ‖B‖²), summed up."""
    return grams.scaling / 2 * (_squares(grams.A) + _squares(grams.B))


def orthogonal(grams: Grams) -> Tensor:
    """The squares of the inner products of two different rows of A, and columns of B, summed up."""
    return _apart(grams.A) + _apart(grams.B)


def _squares(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum()


def _apart(gram: Tensor) -> Tensor:
    return (gram - gram.diagonal(dim1=-2, dim2=-1).diag_embed()).square().sum()


TERMS: dict[str, Callable[[Grams], Tensor]] = {"frobenius": frobenius, "l2": l2, "orthogonal": orthogonal}


def alike(updates: Iterable[LowRankUpdate]) -> list[list[LowRankUpdate]]:
    """The updates by shape and scaling, so that each kind takes a handful of calls."""
    kinds: dict[object, list[LowRankUpdate]] = {}
    for update in updates:
        A, B, slot = update.lora_A, update.lora_B, update.slot
        shapes = (A.shape, B.shape, update.fixed, slot.groups, slot.transposed)
        kind = (shapes, A.dtype, A.device, update.scaling)
        kinds.setdefault(kind, []).append(update)
    return list(kinds.values())


def of_updates(kinds: Sequence[Sequence[LowRankUpdate]], names: Iterable[str]) -> dict[str, Tensor]:
    """The terms of these names, a number each with its gradient, in the updates' own dtype also under
    autocast.

    Args:
        kinds: as of `alike`.
        names: keys of `TERMS`.
    """
    grams = [_grams(updates) for updates in kinds]
    with without_autocast(grams[0].A.device.type):
        return {name: _sum([TERMS[name](one) for one in grams]) for name in names}


def _grams(updates: Sequence[LowRankUpdate]) -> Grams:
    slot, rank, fixed = updates[0].slot, updates[0].rank, updates[0].fixed
    with without_autocast(updates[0].lora_A.device.type):
        A, B = (_rows(slot, [getattr(u, n) for u in updates], n[-1], rank) for n in ("lora_A", "lora_B"))
        own = whole = A @ A.mT, B @ B.mT
        if fixed:
            names = ("lora_fixed_A", "lora_fixed_B")
            F_A, F_B = (_rows(slot, [getattr(u, n) for u in updates], n[-1], fixed) for n in names)
            A, B = _joined(A, B, F_A, F_B)
            whole = A @ A.mT, B @ B.mT
        return Grams(*own, whole, updates[0].scaling)


def _rows(slot: Slot, factors: Sequence[Tensor], which: str, rank: int) -> Tensor:
    """Rows of A, or columns of B, (updates, groups, rank, …)."""
    stacked = torch.stack(tuple(factors))
    if which == "A" or slot.transposed:
        return stacked.view(len(stacked), slot.groups, rank, -1)
    return stacked.view(len(stacked), slot.groups, -1, rank).mT


def _joined(A: Tensor, B: Tensor, F_A: Tensor, F_B: Tensor) -> tuple[Tensor, Tensor]:
    """The whole update's rows. With F the first r of the fixed part, B·A + F_B·F_A is
    (B + F_B)·A − F_B·(A − F_A), of small parts where F_B·F_A is −B0·A0, so that little is lost by
    rounding."""
    rank = A.shape[-2]
    if F_A.shape[-2] < rank:
        return torch.cat((A, F_A), -2), torch.cat((B, F_B), -2)
    first_A, rest_A = F_A[..., :rank, :], F_A[..., rank:, :]
    first_B, rest_B = F_B[..., :rank, :], F_B[..., rank:, :]
    return torch.cat((A, A - first_A, rest_A), -2), torch.cat((B + first_B, -first_B, rest_B), -2)


def of_values(values: Sequence[Tensor], originals: Sequence[Tensor]) -> Tensor:
    """½·‖w − w⁰‖² over all values."""
    return _sum([(_wide(w) - _wide(o)).square().sum() / 2 for w, o in zip(values, originals, strict=True)])


def of_outputs(outputs: Sequence[Tensor], base: Sequence[Tensor]) -> Tensor:
    """The squared distance of outputs from the base's, over the square of those; the mean of the tensors."""
    with without_autocast(outputs[0].device.type):
        shares = []
        for y, y0 in zip(outputs, base, strict=True):
            y, y0 = _wide(y), _wide(y0)
            shares.append((y - y0).square().sum() / y0.square().sum().clamp_min(LEAST))
        return _sum(shares) / len(shares)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(values: Sequence[Tensor]) -> Tensor:
    """On the first one's device."""
    total = values[0]
    for value in values[1:]:
        total = total + value.to(total.device)
    return total
