"""Float16, whose largest number is 65,504: an update's factors shared out so that A·x cannot overflow."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.kernels.common import without_autocast

LARGEST = 2.0**15  # of an entry of B; below A's share of x, so that neither factor is what overflows
SMALLEST = 2.0**-10  # no divisor of a row of A is less, were the row all zeros


@torch.no_grad()
def divisors(A: Tensor, B: Tensor, scaling: float, transposed: bool = False) -> Tensor:
    """c, (groups·r,): (A / c)·x is at most half of x's largest entry, and s·c·B at most `LARGEST`. Where the
    second bound is the one that holds, an overflow is one of s·B·A·x too. c is no part of a graph: s·B·A does
    not depend on it.

    Args:
        A: (groups·r, ...).
        B: (out, r), of a transposed slot (groups·r, ...).
        scaling: s.
    """
    with without_autocast(A.device.type):
        sums = torch.linalg.vector_norm(A.flatten(1), 1, dim=1)
        if transposed:
            tops = B.flatten(1).abs().amax(1)
        else:
            tops = B.view(len(A) // B.shape[1], -1, B.shape[1]).abs().amax(1).flatten()
        return torch.minimum(2 * sums, LARGEST / (abs(scaling) * tops)).clamp_min(SMALLEST)


def shared_out(
    A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, transposed: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A / c and s·c·B, in their own dtype, and c, of `divisors`; A, s·B and None where no care is needed."""
    if dtype != torch.float16:
        return A, B * scaling, None
    c = divisors(A, B, scaling, transposed)
    down = A / c.view(-1, *[1] * (A.dim() - 1))
    up = B * (c * scaling).view(-1, *[1] * (B.dim() - 1)) if transposed else times(B, c * scaling)
    return down, up, c


def times(B: Tensor, c: Tensor) -> Tensor:
    """c·B, group by group: B is (out, r), c (groups·r,)."""
    rank = B.shape[1]
    return (B.view(len(c) // rank, -1, rank) * c.view(-1, 1, rank)).view(B.shape)
