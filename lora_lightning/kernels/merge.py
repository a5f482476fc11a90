"""The merged weights of a step, W' = W + s·B·A, of several layers of one shape at once: few calls for many
layers.

The sum is taken in float32 (or better) and rounded once, in the place of the cast that autocast would make
of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_lightning.kernels.common import autocasts
from lora_lightning.kernels.dora import row_norms
from lora_lightning.kernels.half import divisors
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.kernels.rounding import dithered_, dithers

ALIGNED = 8  # entries of a row that a GPU's matrix units take at once in half precision


class Factored(NamedTuple):
    """A frozen weight and its update.

    Attributes:
        weight: W, (d_out, ...), which counts as (d_out, d_in); it may be a QuantizedTensor.
        A: (r, ...), as (r, d_in).
        B: (d_out, r).
        magnitude: DoRA's m (d_out,), or None.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None


class Merged(NamedTuple):
    """What the products of a step are made with, of one layer.

    Attributes:
        extended: [W' | s·B], (d_out, d_in + r and more), in the dtype of the products; with DoRA
        c∘[W' | s·B].
        low: s·A, (r, d_in); in float16 A / c, so that A·x cannot overflow.
        row_factors: DoRA's c, (d_out,), in float32.
        rank_factors: in float16 s·c, (r,), by which the columns of B's gradient are multiplied.
    """

    extended: Tensor
    low: Tensor
    row_factors: Tensor | None = None
    rank_factors: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """W', (d_out, d_in); its rows are further apart."""
        return self.extended[:, : self.low.shape[1]]

    @property
    def up(self) -> Tensor:
        """s·B, (d_out, r)."""
        r, d_in = self.low.shape
        return self.extended[:, d_in : d_in + r]


@torch.no_grad()
def merge(layers: Sequence[Factored], scaling: float, dtype: torch.dtype, added: bool = True) -> list[Merged]:
    """W' of layers of one shape, dtype and scaling.

    A W of the products' own half precision is rounded by a fixed dither (`rounding`), as small updates of it
    would else be lost; W of float32 has low bits of its own, which do the same for the rounding to nearest.

    Args:
        added: false leaves the update out of W', and the scaling out of s·A: [W | s·B] and A.
    """
    if autocasts(layers[0].A.device.type):  # which would take the sum in half precision
        with torch.autocast(layers[0].A.device.type, enabled=False):
            return merge(layers, scaling, dtype, added)
    A, B = stacked([layer.A.flatten(1) for layer in layers]), stacked([layer.B for layer in layers])
    n, r, d_in = A.shape
    W = stacked([_floats(layer.weight, A.dtype).flatten(1) for layer in layers])
    if not added:
        sums = W
    elif W.dtype == A.dtype:
        sums = torch.baddbmm(W, B, A, alpha=scaling)
    else:
        sums = W.to(A.dtype).baddbmm_(B, A, alpha=scaling)
    c = None
    if m := [layer.magnitude for layer in layers if layer.magnitude is not None]:
        c = stacked(m) / row_norms(sums.flatten(0, 1)).view(n, -1)
        sums, B = sums.mul_(c[..., None]), B * c[..., None]
    width = -(-(d_in + r) // ALIGNED) * ALIGNED
    make = sums.new_empty if width == d_in + r else sums.new_zeros
    extended = make(n, W.shape[1], width, dtype=dtype)
    small = added and sums.dtype != dtype and dithers(W.dtype, dtype)
    extended[..., :d_in].copy_(dithered_(sums, dtype, n) if small else sums)
    torch.mul(B, scaling, out=extended[..., d_in : d_in + r])
    low, shares = _low(A, B, scaling if added else 1.0, dtype)
    return [
        Merged(extended[i], low[i], None if c is None else c[i], None if shares is None else shares[i])
        for i in range(n)
    ]


def stacked(tensors: list[Tensor]) -> Tensor:
    """As torch.stack, but of one no copy."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _floats(weight: Tensor, wide: torch.dtype) -> Tensor:
    return weight.dequantize(wide) if type(weight) is QuantizedTensor else weight


def _low(A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """s·A and None; in float16 A / c and s·c of `half.divisors`. A is (n, r, d_in)."""
    low = torch.empty_like(A, dtype=dtype)
    if dtype != torch.float16:
        return torch.mul(A, scaling, out=low), None
    c = divisors(A.flatten(0, 1), B.flatten(0, 1), scaling).view(A.shape[:2])
    return torch.div(A, c[..., None], out=low), c * scaling
