"""The linear layer with dropout before A as one autograd function: the form of devices other than CPUs.

Shapes as of `linear_merged`; M is the mask and X̃ = M∘x / (1 - p), which dropout makes. Then

    H = X̃·Aᵀ,  y = [x | H]·[W | s·B]ᵀ + b  where y is wider than x, else y = x·Wᵀ + b + H·(s·B)ᵀ
    [dX' | G] = dY·[W | s·B],  dX = dX' + M∘(G·A) / (1 - p),  dA = Gᵀ·X̃,  dB = s·dYᵀ·H

X̃ is kept for the backward and not made again, which would take a pass more for each of its makers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.common import autocasts, cast, graph_gradients, wide_product
from lora_lightning.kernels.linear_form import LinearSpec, plain
from lora_lightning.kernels.merge import Merged
from lora_lightning.kernels.sources import RecomputeSource
from lora_lightning.kernels.together import Member


class DroppedLinearFunction(torch.autograd.Function):
    """`linear_form.plain` with dropout, without DoRA; a second derivative is taken through it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        merged: Merged,
        spec: LinearSpec,
        source: RecomputeSource | None,
        member: Member | None,
    ) -> Tensor:
        """Args beyond those of `plain`:
        merged: [W | s·B] and A, by `merge` with nothing added to W.
        source: what a second derivative makes x from; None saves x.
        member: the layer, where others' weights were formed with its own.
        """
        ctx.spec, ctx.compute, ctx.member = spec, None, member
        y, dropped, mask, H = forward(x, bias, merged, spec)
        kept: tuple[Tensor | None, ...] = (x,)
        if source is not None:
            ctx.compute, kept = source.compute, (*source.rowwise, *source.shared)
        ctx.save_for_backward(W, bias, A, B, *merged[:2], dropped, mask, H, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        W, bias, A, B, extended, low, dropped, mask, H, *kept = ctx.saved_tensors
        spec: LinearSpec = ctx.spec
        if torch.is_grad_enabled():
            x = kept[0] if ctx.compute is None else ctx.compute(*kept, None)
            y = plain(x, W, bias, A, B, None, spec.scaling, x * mask.view(x.shape) / spec.keep)
            gradients = graph_gradients(y, (x, W, bias, A, B), ctx.needs_input_grad[:5], dY)
            return *gradients, None, None, None, None
        if autocasts(dY.device.type):
            with torch.autocast(dY.device.type, enabled=False):
                return DroppedLinearFunction.backward(ctx, dY)
        if ctx.member is not None:
            ctx.member.together.release()
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dY2, (r, d_in), dX = dY.reshape(-1, dY.shape[-1]), A.shape, None
        if not needs_x:
            G = dY2 @ Merged(extended, low).up
        else:
            both = dY2 @ extended
            G = both[:, d_in : d_in + r]
            dX = torch.addcmul(both[:, :d_in], G @ low, mask, value=1 / spec.keep)
            dX = dX.view(*dY.shape[:-1], d_in)
        dA = wide_product(G.t(), dropped, A.dtype) if needs_A else None
        dB = wide_product(dY2.t(), H, B.dtype).mul_(spec.scaling) if needs_B else None
        return dX, None, dY2.sum(0) if needs_bias else None, dA, dB, None, None, None, None


def forward(
    x: Tensor, bias: Tensor | None, merged: Merged, spec: LinearSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and of T tokens X̃ (T, d_in), M and H (T, r)."""
    if autocasts(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return forward(x, bias, merged, spec)
    tokens = cast(x, spec.dtype).reshape(-1, x.shape[-1])
    bias = None if bias is None else cast(bias, spec.dtype)
    dropped, mask = torch.native_dropout(tokens, 1 - spec.keep, True)
    H = dropped @ merged.low.t()
    (d_out, width), (r, d_in) = merged.extended.shape, merged.low.shape
    if d_out > d_in and width == d_in + r:  # reading x once more is less than reading and writing y
        y = F.linear(torch.cat([tokens, H], dim=1), merged.extended, bias)
    else:
        y = F.linear(tokens, merged.weight, bias).addmm_(H, merged.up.t())
    return y.view(*x.shape[:-1], d_out), dropped, mask, H
