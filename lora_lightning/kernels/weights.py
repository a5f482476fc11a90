"""The update of a weight as a matrix, and what DoRA makes of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def factor_groups(A: Tensor, B: Tensor) -> int:
    """Groups that have factors of their own: A is (groups·r, ...), B is (out, r)."""
    return A.shape[0] // B.shape[1]


def update_of(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """s·B·A, group by group, in the shape of the weight (out, in / groups, *kernel)."""
    groups, rank = factor_groups(A, B), B.shape[1]
    if groups == 1:  # one matrix product is faster than a batch of one
        return (scaling * B @ A.flatten(1)).view(weight.shape)
    return torch.bmm(scaling * B.view(groups, -1, rank), A.view(groups, rank, -1)).view(weight.shape)


def sum_of(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W + s·B·A in A's dtype, in one pass over W where it can be."""
    weight = weight.to(A.dtype)
    if factor_groups(A, B) == 1 and weight.is_contiguous():
        return torch.addmm(weight.flatten(1), B, A.flatten(1), alpha=scaling).view(weight.shape)
    return weight + update_of(weight, A, B, scaling)


def factors_gradient(dW: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The gradients of A and B by that of s·B·A."""
    groups, rank = factor_groups(A, B), B.shape[1]
    D = dW.reshape(groups, dW.shape[0] // groups, -1)  # (groups, out / groups, in / groups · kernel)
    dA = (scaling * B.view(groups, -1, rank).mT @ D).view(A.shape)
    return dA, (scaling * (D @ A.reshape(groups, rank, -1).mT)).view(B.shape)


def row_norms(weight: Tensor) -> Tensor:
    """DoRA's norms of the rows, (out,)."""
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)  # m / norm is 1 for a row of zeros, not NaN


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Autocast off where it is on; the meta device has none."""
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return nullcontext()  # turning off what is off would take as long as a small product
    return torch.autocast(device_type, enabled=False)
