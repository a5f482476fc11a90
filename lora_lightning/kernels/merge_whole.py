"""The merged weights of a step, of several convolutions of one shape at once: as `merge` makes them of linear
layers, but each whole and contiguous, in W's memory format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_lightning.kernels.common import without_autocast
from lora_lightning.kernels.dora import row_norms
from lora_lightning.kernels.merge import stacked
from lora_lightning.kernels.rounding import dithered_, dithers


class FactoredKernel(NamedTuple):
    """A convolution's frozen weight and its update.

    Attributes:
        weight: W, (out, in / groups, *kernel).
        A: (groups·r, in / groups, *kernel), for the groups that have factors of their own.
        B: (out, r).
        magnitude: DoRA's m, (out,), or None.
        rows: constants (out,) by which the rows of W' are multiplied at last, of a norm folded into it.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None
    rows: Tensor | None = None


class Whole(NamedTuple):
    """What the products of a step are made with, of one layer.

    Attributes:
        weight: c∘(W + s·B·A), of W's shape, in the dtype of the products.
        row_factors: c, (out,), of DoRA and of a norm that is folded into it; None for ones.
    """

    weight: Tensor
    row_factors: Tensor | None = None


@torch.no_grad()
def merge_whole(layers: Sequence[FactoredKernel], scaling: float, dtype: torch.dtype) -> list[Whole]:
    """W' of layers of one shape, memory format, dtype and scaling. Rounded as by `merge`, but to nearest
    where a norm is folded into it, as c∘W has low bits of its own."""
    first = layers[0]
    last = first.weight.dim() > 3 and not first.weight.is_contiguous() and _is_last(first.weight)
    with without_autocast(first.A.device.type):  # which would take the sum in half precision
        W = stacked([f.weight.movedim(1, -1) if last else f.weight for f in layers])
        A, B = stacked([f.A for f in layers]), stacked([f.B for f in layers])
        A = (A.movedim(2, -1) if last else A).flatten(2)  # (n, groups·r, columns), in the order of W's
        n, out, rank, shape = *B.shape, W.shape[1:]
        groups = A.shape[1] // rank
        flat = W.view(n * groups, out // groups, -1)
        parts = B.view(n * groups, -1, rank), A.reshape(n * groups, rank, -1)
        if flat.dtype == A.dtype:
            sums = torch.baddbmm(flat, *parts, alpha=scaling)
        else:
            sums = flat.to(A.dtype).baddbmm_(*parts, alpha=scaling)
        sums = sums.view(n, out, -1)
        c = _row_factors(layers, sums)
        sums = sums if c is None else sums.mul_(c[..., None])
        if sums.dtype != dtype and dithers(W.dtype, dtype) and first.rows is None:
            sums = dithered_(sums, dtype, n)
        formed = sums.to(dtype).contiguous().view(n, *shape)
    weights = [W.movedim(-1, 1) if last else W for W in formed.unbind()]
    return [Whole(W, None if c is None else c[i]) for i, W in enumerate(weights)]


def _is_last(weight: Tensor) -> bool:
    return weight.movedim(1, -1).is_contiguous()


def _row_factors(layers: Sequence[FactoredKernel], sums: Tensor) -> Tensor | None:
    """c, (n, out), of the sums (n, out, columns)."""
    magnitudes = [f.magnitude for f in layers if f.magnitude is not None]
    rows = [f.rows for f in layers if f.rows is not None]
    if not magnitudes:
        return stacked(rows) if rows else None
    c = stacked(magnitudes) / row_norms(sums.flatten(0, 1)).view(len(layers), -1)
    return c * stacked(rows) if rows else c
