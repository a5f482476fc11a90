"""A convolution whose weight is W' = W + s·B·A, with the gradients of A and B made from that of W'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lora_lightning.kernels.conv_products import ConvSpec, convolve, dense_in, gradients, memory_format
from lora_lightning.kernels.conv_reference import by_the_reference, save, saved, scaled_sum
from lora_lightning.kernels.sources import RecomputeSource
from lora_lightning.kernels.weights import factors_gradient, sum_of


class DenseConv(Function):
    """The form "dense"; arguments as of `conv_reference.reference`. It saves x, and W' in the dtype of the
    products, formed in A's dtype and rounded once.

    dX and dW' come from one call; dA = s·Bᵀ·dW' and dB = s·dW'·Aᵀ are products of a weight's size. On a CPU
    W' is made again instead: 24 of 3500 ms a step of ResNet-50, for 94 MiB.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                magnitude: Tensor | None, spec: ConvSpec, source: RecomputeSource | None,
    ) -> Tensor:  # fmt: skip
        ctx.spec = spec
        W, norms = scaled_sum(weight, A, B, magnitude, spec)
        W = W.to(x.dtype)
        kept = (None, None) if spec.cpu else (W, norms)
        save(ctx, x, source, weight, bias, A, B, magnitude, *kept)
        return convolve(x, W, bias, spec)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, magnitude, W, norms = saved(ctx)
        spec: ConvSpec = ctx.spec
        if torch.is_grad_enabled():
            return by_the_reference(ctx, dY, (x, weight, bias, A, B, magnitude), None)
        if spec.cpu:
            x, dY = dense_in(memory_format(x), x, dY)
        if W is None:
            W, norms = scaled_sum(weight, A, B, magnitude, spec)
            W = W.to(x.dtype)
        factors = any(ctx.needs_input_grad[3:6])
        dX, dW, db = gradients(dY, x, W, spec, ctx.needs_input_grad[0], factors, ctx.needs_input_grad[2])
        dA = dB = dm = None
        if dW is not None:
            dW = dW.to(A.dtype, memory_format=torch.contiguous_format)
            if magnitude is not None:  # W' = m / norm · V; the norm is held constant
                V = sum_of(weight, A, B, spec.scaling)
                dm = (dW * V).flatten(1).sum(1) / norms
                dW = dW * (magnitude / norms).view(-1, *[1] * (dW.dim() - 1))
            dA, dB = factors_gradient(dW, A, B, spec.scaling)
        return dX, None, db, dA, dB, dm, None, None
