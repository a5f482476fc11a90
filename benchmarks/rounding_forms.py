"""The ways to round W' = W + s·B·A to bfloat16 that benchmarks.rounding compares, and layers that take one.

Shapes: x is (..., d_in); W is (d_out, d_in), of a convolution (out, in / groups, *kernel); A is (r, d_in) and
B is (d_out, r), float32. With X of T tokens, and W' the same in the forward and the backward,

    y = x·W'ᵀ + b,  dX = dY·W',  dA = (dY·(s·B))ᵀ·X,  dB = dYᵀ·(X·(s·A)ᵀ)

where each product has bfloat16 factors, is summed in float32 and rounded to bfloat16, as on a GPU. A
convolution takes dA = (s·B)ᵀ·dW' and dB = s·dW'·Aᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.common import without_autocast
from lora_lightning.kernels.conv_products import CONVOLUTIONS

HALF = torch.bfloat16
ROUNDINGS = ("exact", "nearest", "stochastic", "dither")
HALF_DIGITS = 8  # of bfloat16's mantissa, with the first one, which is not stored
LOW_BITS = 16  # of float32's 23 of the mantissa: those that bfloat16 has not


class Rounder:
    """Rounds float32 sums to bfloat16.

    Args:
        rounding: "nearest"; "stochastic", up with the probability of the rest, by fresh noise at each call;
            "dither", the same with noise drawn once for each shape; "exact" leaves float32.
        seed: of the noise.
    """

    def __init__(self, rounding: str, seed: int = 0) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r}: give one of {', '.join(ROUNDINGS)}.")
        self.rounding = rounding
        self._generator = torch.Generator().manual_seed(seed)
        self._dithers: dict[torch.Size, Tensor] = {}

    def __call__(self, total: Tensor) -> Tensor:
        """The sum (…), float32 and finite, rounded."""
        if self.rounding == "exact":
            return total
        if self.rounding == "nearest":
            return total.to(HALF)
        return truncated(total, self._noise(total.shape))

    def _noise(self, shape: torch.Size) -> Tensor:
        if self.rounding == "stochastic":
            return noise(shape, self._generator)
        if shape not in self._dithers:
            self._dithers[shape] = noise(shape, self._generator)
        return self._dithers[shape]


def noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Whole numbers below 2^16, int32."""
    return torch.randint(2**LOW_BITS, shape, generator=generator, dtype=torch.int32)


def truncated(total: Tensor, noise: Tensor) -> Tensor:
    """Float32 with noise added to its low bits, which are then cut off: away from zero with the probability
    of what is cut off; and a number that bfloat16 has stays what it is."""
    return ((total.view(torch.int32) + noise) & -(2**LOW_BITS)).view(torch.float32).to(HALF)


def units(W: Tensor) -> Tensor:
    """The distance of bfloat16's numbers at each of W, float32."""
    exponents = torch.frexp(W.float())[1]  # W = m·2^e with 1/2 <= |m| < 1
    return torch.exp2((exponents - HALF_DIGITS).float())


def effective(W: Tensor, A: Tensor, B: Tensor, scaling: float, rounder: Rounder) -> Tensor:
    """W', of W's shape: the sum in float32, rounded once."""
    return rounder((W.float().flatten(1) + scaling * (B @ A.flatten(1))).view(W.shape))


class MergedLinear(torch.autograd.Function):
    """y of W' and the factored gradients, as above."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        rounder: Rounder,
    ) -> Tensor:
        merged = effective(W, A, B, scaling, rounder)
        ctx.save_for_backward(x, merged, A, B)
        ctx.scaling = scaling
        bias = None if bias is None else bias.to(merged.dtype)
        return F.linear(x.to(merged.dtype), merged, bias).to(HALF)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, A, B = ctx.saved_tensors
        X, dY2 = x.flatten(0, -2), dY.flatten(0, -2)  # (T, d_in), (T, d_out)
        dX = (dY.to(merged.dtype) @ merged).to(HALF)
        dA = (dY2 @ (ctx.scaling * B).to(HALF)).t() @ X
        dB = dY2.t() @ (X @ (ctx.scaling * A).to(HALF).t())
        return dX, None, None, dA.float(), dB.float(), None, None


class MergedWeight(torch.autograd.Function):
    """W', whose gradient passes the rounding and is multiplied with the factors in float32."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, A: Tensor, B: Tensor, scaling: float, rounder: Rounder) -> Tensor:
        ctx.save_for_backward(A, B)
        ctx.scaling = scaling
        return effective(W, A, B, scaling, rounder)

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> tuple[Tensor | None, ...]:
        A, B = ctx.saved_tensors
        flat = ctx.scaling * dW.float().flatten(1)
        return None, (B.t() @ flat).view(A.shape), flat @ A.flatten(1).t(), None, None


@contextmanager
def rounded_by(rounder: Rounder) -> Iterator[None]:
    """Adapted linear layers and convolutions compute by W' rounded so, in half precision."""
    with ExitStack() as stack:
        for name, layer in (("linear", _linear), ("conv", _conv)):
            place = f"lora_lightning.layers.{name}.lora_{name}"
            stack.enter_context(patch(place, partial(layer, rounder)))
        yield


def _linear(
    rounder: Rounder,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    **_: Any,
) -> Tensor:
    """In the place of `lora_linear`, without its dropout and DoRA."""
    with without_autocast(x.device.type):
        y: Tensor = MergedLinear.apply(x.to(HALF), W, bias, A, B, scaling, rounder)
    return y


def _conv(
    rounder: Rounder,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    **_: Any,
) -> Tensor:
    """In the place of `lora_conv`, without its dropout and DoRA."""
    with without_autocast(x.device.type):
        merged = MergedWeight.apply(W, A, B, scaling, rounder)
        low, bias = x.to(HALF).to(merged.dtype), None if bias is None else bias.to(merged.dtype)
        y = CONVOLUTIONS[W.dim() - 2](low, merged, bias, stride, padding, dilation, groups)
    return y.to(HALF)
