"""The linear layer with merged weights W' = W + s·B·A as one autograd function: the form of devices other
than CPUs.

There forming W' costs next to nothing beside the activations of thousands of tokens, and calls and passes
over memory decide. Shapes: x is (..., d_in), seen as (T, d_in); W' is (d_out, d_in); A is (r, d_in); B is
(d_out, r). Then

    y = x·W'ᵀ + b,  [dX | G] = dY·[W' | s·B],  dA = Gᵀ·X,  dB = dYᵀ·(X·(s·A)ᵀ)     "extended", or G apart; or
    y = x·W'ᵀ + b,  dX = dY·W',  dW = dYᵀ·X,   dA = s·Bᵀ·dW,  dB = s·dW·Aᵀ         "dense"

With DoRA, c = m / ‖rows of W + s·B·A‖ held constant but for m, W' is c∘(W + s·B·A), and "dense" gives dm as
well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.common import autocasts, cast, graph_gradients, wide_product
from lora_lightning.kernels.dora import magnitude_gradient
from lora_lightning.kernels.linear_form import LinearSpec, plain
from lora_lightning.kernels.merge import Factored, Merged, merge
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.kernels.sources import RecomputeSource
from lora_lightning.kernels.together import Member


class MergedLinearFunction(torch.autograd.Function):
    """`linear_form.plain` without dropout; a second derivative is taken through it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor | None,
        merged: Merged,
        spec: LinearSpec,
        source: RecomputeSource | None,
        member: Member | None,
    ) -> Tensor:
        """Args beyond those of `plain`:
        merged: formed of W, A, B and magnitude.
        source: what the backward makes x from; None saves x.
        member: the layer, where others' weights were formed with its own.
        """
        ctx.spec, ctx.compute, ctx.member = spec, None, member
        x = cast(x, spec.dtype)
        y, kept = forward(x, bias, merged, spec), (x,)
        if source is not None:
            ctx.compute = source.compute
            kept = (*source.rowwise, *source.shared)  # type: ignore[assignment]  # a norm may lack a bias
        if type(W) is QuantizedTensor:
            merged = Merged(*[None] * 4)  # type: ignore[arg-type]  # formed again: no float copy of W is kept
        ctx.save_for_backward(W, bias, A, B, magnitude, *merged, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        W, bias, A, B, magnitude, *tensors = ctx.saved_tensors
        spec: LinearSpec = ctx.spec
        if autocasts(dY.device.type) and not torch.is_grad_enabled():
            with torch.autocast(dY.device.type, enabled=False):
                return MergedLinearFunction.backward(ctx, dY)
        if ctx.member is not None:
            ctx.member.together.release()
        x = tensors[4] if ctx.compute is None else ctx.compute(*tensors[4:], None)
        if torch.is_grad_enabled():
            y = plain(x, W, bias, A, B, magnitude, spec.scaling, x)
            wanted = graph_gradients(y, (x, W, bias, A, B, magnitude), ctx.needs_input_grad[:6], dY)
            return *wanted, None, None, None, None
        merged = Merged(*tensors[:4])
        if tensors[0] is None:
            (merged,) = merge([Factored(W, A, B, magnitude)], spec.scaling, spec.dtype)
        needs_x, _, needs_bias, needs_A, needs_B, needs_m = ctx.needs_input_grad[:6]
        dY2 = dY.reshape(-1, dY.shape[-1])  # (T, d_out)
        X = cast(x, spec.dtype).reshape(-1, x.shape[-1]) if needs_A or needs_B or needs_m else None
        dX, dA, dB, dm = (_dense if spec.backward == "dense" else _factored)(
            dY2, X, A, B, magnitude, merged, spec, (needs_x, needs_A, needs_B)
        )
        dX = None if dX is None else dX.view(*dY.shape[:-1], W.shape[1])
        return dX, None, dY2.sum(0) if needs_bias else None, dA, dB, dm, None, None, None, None


def forward(x: Tensor, bias: Tensor | None, merged: Merged, spec: LinearSpec) -> Tensor:
    """x·W'ᵀ + b, in the dtype of the products."""
    bias = None if bias is None else cast(bias, spec.dtype)
    if not autocasts(x.device.type):
        return F.linear(cast(x, spec.dtype), merged.weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(cast(x, spec.dtype), merged.weight, bias)


def _factored(
    dY: Tensor,
    X: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    merged: Merged,
    spec: LinearSpec,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """dX, dA and dB by products with r columns."""
    needs_x, needs_A, needs_B = needs
    (r, d_in), dX, G, dA, dB = A.shape, None, None, None, None
    if needs_x and needs_A and spec.backward == "extended":
        both = dY @ merged.extended
        dX, G = both[:, :d_in], both[:, d_in : d_in + r]
        dX = dX.contiguous() if spec.packed else dX
    else:
        dX = dY @ merged.weight if needs_x else None
        G = dY @ merged.up if needs_A else None
    if G is not None and X is not None:
        dA = wide_product(G.t(), X, A.dtype)
    if needs_B and X is not None:
        dB = wide_product(dY.t(), X @ merged.low.t(), B.dtype)
        dB = dB if merged.rank_factors is None else dB.mul_(merged.rank_factors)
    return dX, dA, dB, None


def _dense(
    dY: Tensor,
    X: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    merged: Merged,
    spec: LinearSpec,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX, and dA, dB and dm by way of the gradient of W'."""
    dX = dY @ merged.weight if needs[0] else None
    if X is None:
        return dX, None, None, None
    dm, dW = None, wide_product(dY.t(), X, A.dtype)
    if magnitude is not None and merged.row_factors is not None:
        dm = magnitude_gradient((dW * merged.weight).sum(1), magnitude)
        dW = dW.mul_(merged.row_factors[:, None])
    dA = torch.addmm(A[:1], B.t(), dW, beta=0, alpha=spec.scaling) if needs[1] else None
    dB = torch.addmm(B[:1], dW, A.t(), beta=0, alpha=spec.scaling) if needs[2] else None
    return dX, dA, dB, dm
