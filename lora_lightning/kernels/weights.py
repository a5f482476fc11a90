"""The update of a convolution's weight as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.kernels.common import cast
from lora_lightning.kernels.quantized_tensor import QuantizedTensor


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
    if weight.dtype != A.dtype or type(weight) is QuantizedTensor:
        weight = cast(weight, A.dtype)
    if A.shape[0] == B.shape[1] and weight.is_contiguous():
        return torch.addmm(weight.flatten(1), B, A.flatten(1), alpha=scaling).view(weight.shape)
    return weight + update_of(weight, A, B, scaling)


def factors_gradient(dW: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The gradients of A and B by that of s·B·A."""
    groups, rank = factor_groups(A, B), B.shape[1]
    D = dW.reshape(groups, dW.shape[0] // groups, -1)  # (groups, out / groups, in / groups · kernel)
    left, right = B.view(groups, -1, rank), A.reshape(groups, rank, -1)
    # with a beta of 0 the first argument lends its shape alone, and the scaling is no pass of its own
    if groups == 1:  # one matrix product is faster than a batch of one
        dA = torch.addmm(right[0], left[0].mT, D[0], beta=0, alpha=scaling)
        dB = torch.addmm(left[0], D[0], right[0].mT, beta=0, alpha=scaling)
    else:
        dA = torch.baddbmm(right, left.mT, D, beta=0, alpha=scaling)
        dB = torch.baddbmm(left, D, right.mT, beta=0, alpha=scaling)
    return dA.view(A.shape), dB.view(B.shape)
