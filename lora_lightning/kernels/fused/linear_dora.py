"""The linear layer of `implementation="fused"` with DoRA: the factors' and magnitudes' gradients by an
operator each.

Shapes: x is (..., d_in), seen as (T, d_in); W is (d_out, d_in); A is (r, d_in); B is (d_out, r); m is
(d_out,). With c = m / ‖rows of W + s·B·A‖, held constant but for m,

    E = c∘[W + s·B·A | s·B],  y = x·E[:, :d_in]ᵀ + b,  [dX | G] = dY·E,
    dA = Gᵀ·X,  dB = c∘(s·dYᵀ·(X·Aᵀ)),  dm = (dY∘(y - b)).sum(0) / m

`merge` forms E, of many layers at once: the norms of its rows take a sum of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_lightning.kernels import linear_merged
from lora_lightning.kernels.common import autocasts, cast, graph_gradients, without_autocast
from lora_lightning.kernels.dora import as_it_was, watched
from lora_lightning.kernels.fused import operators
from lora_lightning.kernels.fused.inputs import Input
from lora_lightning.kernels.fused.linear import comes_together
from lora_lightning.kernels.linear_form import LinearSpec, plain
from lora_lightning.kernels.merge import Merged
from lora_lightning.kernels.together import Member


class FusedDoRAFunction(torch.autograd.Function):
    """The layer with the gradients above; a second derivative is taken through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        merged: Merged,
        spec: LinearSpec,
        given: Input,
        member: Member | None,
    ) -> Tensor:
        """Args beyond those of `lora_linear`:
        merged: formed of W, A, B and magnitude.
        given: what the backward makes x from.
        member: the layer, where others' weights were formed with its own.
        """
        y = linear_merged.forward(x, bias, merged, spec)
        if given.u is x:
            given = Input("identity", cast(x, spec.dtype))
        ctx.spec, ctx.source, ctx.member = spec, given.source, member
        ctx.watched = watched(y)
        ctx.save_for_backward(W, bias, A, B, magnitude, *merged[:3], y.data, *given[1:])
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        if autocasts(dY.device.type) and not torch.is_grad_enabled():
            with without_autocast(dY.device.type):
                return FusedDoRAFunction.backward(ctx, dY)
        W, bias, A, B, magnitude, E, low, c, y, *tensors = ctx.saved_tensors
        spec: LinearSpec = ctx.spec
        needs, given = ctx.needs_input_grad, Input(ctx.source, *tensors)
        if torch.is_grad_enabled():
            x = given.whole()
            y = plain(x, W, bias, A, B, magnitude, spec.scaling, x)
            wanted = (x, W, bias, A, B, magnitude)
            return *graph_gradients(y, wanted, needs[:6], dY), *[None] * 4
        if ctx.member is not None:
            ctx.member.together.release()
        dY2, merged = dY.reshape(-1, dY.shape[-1]), Merged(E, low)  # (T, d_out)
        (rank, d_in), dX, dA, dB, dm = A.shape, None, None, None, None
        factors = needs[3] or needs[4]
        if needs[0] and factors and comes_together(given.source, d_in, len(W)):
            both = dY2 @ E
            dX, G = both[:, :d_in].view(*dY.shape[:-1], d_in), both[:, d_in : d_in + rank]
        else:
            dX = (dY2 @ merged.weight).view(*dY.shape[:-1], d_in) if needs[0] else None
            G = dY2 @ merged.up if factors else None
        if factors:
            dA, dB = operators.factor_gradients(dY2, *given.by_tokens(), given.source, A, G, spec.scaling)
            dA = cast(dA, A.dtype) if needs[3] else None
            dB = cast(dB * c[:, None], B.dtype) if needs[4] else None
        if needs[5]:
            if not as_it_was(ctx.watched):
                y = linear_merged.forward(given.whole(), bias, merged, spec)
            dm = operators.magnitude_gradient(dY2, y.reshape(dY2.shape), bias, magnitude)
            dm = cast(dm, magnitude.dtype)
        ctx.watched = None
        return dX, None, dY2.sum(0) if needs[2] else None, dA, dB, dm, *[None] * 4
