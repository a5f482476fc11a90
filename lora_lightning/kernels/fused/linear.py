"""The linear layer of `implementation="fused"`: merged weights, and the factors' gradients by one operator.

Shapes: x is (..., d_in), seen as (T, d_in); W is (d_out, d_in); A is (r, d_in); B is (d_out, r). Then

    E = [W + s·B·A | s·B],  y = x·E[:, :d_in]ᵀ + b,  [dX | G] = dY·E,  dA = Gᵀ·X,  dB = s·dYᵀ·(X·Aᵀ)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import common
from lora_lightning.kernels.common import (
    autocasts,
    cast,
    graph_gradients,
    is_plain,
    product_dtype,
    without_autocast,
)
from lora_lightning.kernels.fused import operators
from lora_lightning.kernels.fused.inputs import Input, input_of
from lora_lightning.kernels.fused.linear_dropped import (
    Dropping,
    FusedDroppedFunction,
    base_and_up,
    dropped_forward,
    new_seed,
)
from lora_lightning.kernels.linear_form import plain
from lora_lightning.kernels.quantized_tensor import QuantizedTensor


def suits(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    dropout: float,
) -> bool:
    """Whether `fused_linear` may compute `lora_linear` of these; everything else goes the way of "auto".

    Not with DoRA and dropout at once, nor DoRA in float16 or of a W in few bits; not for a W that trains, nor
    where an autograd function may not run; and not in float64, but on a CPU, which has no kernels.
    """
    quantized = type(W) is QuantizedTensor
    dtype = product_dtype(x)
    return (
        (magnitude is None or not (dropout or quantized or dtype == torch.float16))
        and not W.requires_grad
        and (W.dtype == x.dtype or autocasts(x.device.type))
        and (dtype != torch.float64 or common.on_cpu(x.device))
        and is_plain(x, None if quantized else W, bias, A, B, magnitude)
    )


def fused_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, dropout: float
) -> Tensor:
    """y = x·Wᵀ + b + s·X̃·Aᵀ·Bᵀ, (..., d_out), of x's dtype; under autocast of its dtype."""
    dtype = product_dtype(x)
    if dropout:
        return _dropped(x, W, bias, A, B, Dropping(scaling, dropout, dtype))
    if not torch.is_grad_enabled():
        return _forward(x, bias, operators.merged(W, A, B, scaling, dtype), W.shape[1], dtype)
    if type(W) is QuantizedTensor:
        W = W.detach()  # another object: a parameter that the graph holds cannot be moved
    y: Tensor = FusedLinearFunction.apply(x, W, bias, A, B, scaling, dtype, input_of(x))
    return y


def _dropped(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, how: Dropping) -> Tensor:
    """The same with dropout."""
    seed = new_seed(x)
    if not torch.is_grad_enabled():
        return dropped_forward(x, base_and_up(W, A, B, how), bias, A, B, seed, how)
    W = W.detach() if type(W) is QuantizedTensor else W
    y: Tensor = FusedDroppedFunction.apply(x, W, bias, A, B, seed, how, input_of(x))
    return y


class FusedLinearFunction(torch.autograd.Function):
    """`fused_linear` with the gradients above; a second derivative is taken through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dtype: torch.dtype,
        given: Input,
    ) -> Tensor:
        """Args beyond those of `fused_linear`:
        dtype: of the products.
        given: what the backward makes x from.
        """
        E = operators.merged(W, A, B, scaling, dtype)
        if given.u is x:
            given = Input("identity", cast(x, dtype))
        ctx.scaling, ctx.dtype, ctx.source = scaling, dtype, given.source
        # of a W in few bits no copy in floats outlives the call
        ctx.save_for_backward(W, bias, A, B, None if type(W) is QuantizedTensor else E, *given[1:])
        return _forward(x, bias, E, W.shape[1], dtype)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        if autocasts(dY.device.type) and not torch.is_grad_enabled():
            with without_autocast(dY.device.type):
                return FusedLinearFunction.backward(ctx, dY)
        W, bias, A, B, E, *kept = ctx.saved_tensors
        scaling, needs, given = ctx.scaling, ctx.needs_input_grad, Input(ctx.source, *kept)
        if torch.is_grad_enabled():
            x = given.whole()
            y = plain(x, W, bias, A, B, None, scaling, x)
            return *graph_gradients(y, (x, W, bias, A, B), needs[:5], dY), *[None] * 3
        E = operators.merged(W, A, B, scaling, ctx.dtype) if E is None else E
        dY2 = dY.reshape(-1, dY.shape[-1])  # (T, d_out)
        rank, d_in = A.shape
        dX = G = dA = dB = None
        factors = needs[3] or needs[4]
        if needs[0] and factors and comes_together(given.source, d_in, len(W)):
            both = dY2 @ E  # (T, d_in + r and more)
            dX, G = both[:, :d_in].view(*dY.shape[:-1], d_in), both[:, d_in : d_in + rank]
        elif needs[0]:
            dX = (dY2 @ E[:, :d_in]).view(*dY.shape[:-1], d_in)
        if factors:
            G = dY2 @ E[:, d_in : d_in + rank] if G is None else G
            dA, dB = operators.factor_gradients(dY2, *given.by_tokens(), given.source, A, G, scaling)
            dA, dB = (cast(t, A.dtype) if need else None for t, need in ((dA, needs[3]), (dB, needs[4])))
        return dX, None, dY2.sum(0) if needs[2] else None, dA, dB, *[None] * 3


def comes_together(source: str, d_in: int, d_out: int) -> bool:
    """Whether dX and G are one product, which leaves dX's rows further apart. The backward of an activation
    takes them so; a norm's and attention's copy them: 2·d_in numbers a token, where G alone reads d_out."""
    return source not in ("identity", "layer_norm", "rms_norm") or d_out > 2 * d_in


def _forward(x: Tensor, bias: Tensor | None, E: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    with without_autocast(x.device.type):
        y = F.linear(cast(x, dtype), E[:, :d_in], None if bias is None else cast(bias, dtype))
    return y.contiguous().data  # as a view it could not be changed in place
