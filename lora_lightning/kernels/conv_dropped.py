"""A convolution with a low-rank branch whose input drops entries, where this is no CPU: few calls, and few
passes over the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lora_lightning.kernels.conv_products import (
    ConvSpec,
    add_expanded,
    convolve,
    expand,
    gradients,
    up_gradient,
)
from lora_lightning.kernels.conv_reference import by_the_reference, save, saved
from lora_lightning.kernels.dropout import scale
from lora_lightning.kernels.half import shared_out, times
from lora_lightning.kernels.merge_whole import Whole
from lora_lightning.kernels.sources import RecomputeSource
from lora_lightning.kernels.together import Together


class DroppedConv(Function):
    """The form "dropped"; arguments as of `DenseConv`, without magnitudes and W'. It saves x, the mask, and
    what is small: h = conv(dropped x, A) and the factors in the dtype of the products.

    One call drops, one drops again in the backward, and one adds what the branch gives to dX, dropped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                magnitude: Tensor | None, spec: ConvSpec, source: RecomputeSource | None, whole: Whole | None,
                together: Together | None,
    ) -> Tensor:  # fmt: skip
        ctx.spec = spec
        y = convolve(x, weight.to(x.dtype), bias, spec)
        kept, mask = torch.native_dropout(x, spec.dropout, True)
        if x.dtype == torch.float16:
            down, up, shares = shared_out(A, B, spec.scaling, x.dtype)
            up = up.to(x.dtype)
        else:
            down, up, shares = A, torch.mul(B, spec.scaling, out=x.new_empty(B.shape)), None
        down = down.to(x.dtype)
        h = convolve(kept, down, None, spec)
        save(ctx, x, source, weight, bias, A, B, magnitude, mask, h, down, up, shares)
        return add_expanded(y, h, up, spec)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, magnitude, mask, h, down, up, shares = saved(ctx)
        spec: ConvSpec = ctx.spec
        if torch.is_grad_enabled():
            return by_the_reference(ctx, dY, (x, weight, bias, A, B, magnitude), mask)
        need_x, _, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        dX, _, db = gradients(dY, x, weight.to(x.dtype), spec, need_x, False, need_bias)
        dA = dB = None
        if need_B:
            dB = torch.mul(up_gradient(dY, h, up, spec), spec.scaling, out=torch.empty_like(B))
            dB = dB if shares is None else times(dB, shares)
        if need_A or need_x:
            turned = up.view(spec.groups, -1, up.shape[1]).mT.flatten(0, 1)  # (groups·r, out / groups)
            G = expand(dY, turned, spec)
            kept = torch.ops.aten.native_dropout_backward(x, mask, scale(spec.dropout)) if need_A else x
            change, dA, _ = gradients(G, kept, down, spec, need_x, need_A)
            if dX is not None and change is not None:
                dX = dX.addcmul_(change, mask, value=scale(spec.dropout))
        if dA is not None:
            dA = dA.to(A.dtype)
            dA = dA if shares is None else dA / shares.view(-1, *[1] * (A.dim() - 1))
        return dX, None, db, dA, dB, None, None, None, None, None
