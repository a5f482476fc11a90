"""The update of a convolution's weight as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.kernels.common import cast


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
    weight = cast(weight, A.dtype)
    if A.shape[0] == B.shape[1] and weight.is_contiguous():
        return torch.addmm(weight.flatten(1), B, A.flatten(1), alpha=scaling).view(weight.shape)
    return weight + update_of(weight, A, B, scaling)


def factors_gradient(dW: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The gradients of A and B by that of s·B·A."""
    groups, rank = factor_groups(A, B), B.shape[1]
    D = dW.reshape(groups, dW.shape[0] // groups, -1)  # (groups, out / groups, in / groups · kernel)
    dA = (scaling * B.view(groups, -1, rank).mT @ D).view(A.shape)
    return dA, (scaling * (D @ A.reshape(groups, rank, -1).mT)).view(B.shape)
