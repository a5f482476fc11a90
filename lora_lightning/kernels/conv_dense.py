"""A convolution whose weight is W' = W + s·B·A, with the gradients of A and B made from that of W'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lora_lightning.kernels.conv_products import (
    ConvSpec,
    convolve,
    convolve_merged,
    dense_in,
    gradients,
    memory_format,
)
from lora_lightning.kernels.conv_reference import by_the_reference, save, saved, scaled_sum
from lora_lightning.kernels.dora import magnitude_gradient
from lora_lightning.kernels.merge_whole import Whole
from lora_lightning.kernels.sources import RecomputeSource
from lora_lightning.kernels.together import Together
from lora_lightning.kernels.weights import factors_gradient


class DenseConv(Function):
    """The form "dense"; arguments as of `conv_reference.reference`. It saves x, and a W' that was given;
    on a CPU it makes that again: 24 of 3500 ms a step of ResNet-50, for 94 MiB.

    dX and dW' come from one call; dA = s·Bᵀ·dW' and dB = s·dW'·Aᵀ are products of a weight's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                magnitude: Tensor | None, spec: ConvSpec, source: RecomputeSource | None, whole: Whole | None,
                together: Together | None,
    ) -> Tensor:  # fmt: skip
        """Args beyond those of `reference`:
        source: what the backward makes x from; None saves x.
        whole: W', elsewhere than on a CPU.
        together: what formed that together with others'.
        """
        ctx.spec, ctx.together = spec, together
        save(ctx, x, source, weight, bias, A, B, magnitude, *(whole or (None, None)))
        if whole is not None:
            return convolve_merged(x, whole.weight, bias, spec)
        return convolve(x, scaled_sum(weight, A, B, magnitude, spec)[0].to(x.dtype), bias, spec)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, magnitude, W, c = saved(ctx)
        spec: ConvSpec = ctx.spec
        if ctx.together is not None:
            ctx.together.release()
        if torch.is_grad_enabled():
            return by_the_reference(ctx, dY, (x, weight, bias, A, B, magnitude), None)
        if spec.cpu:
            x, dY = dense_in(memory_format(x), x, dY)
        if W is None:
            W, c = scaled_sum(weight, A, B, magnitude, spec)
            W = W.to(x.dtype)
        factors = any(ctx.needs_input_grad[3:6])
        dX, dW, db = gradients(dY, x, W, spec, ctx.needs_input_grad[0], factors, ctx.needs_input_grad[2])
        dA = dB = dm = None
        if dW is not None:
            if magnitude is not None:
                dm = magnitude_gradient((dW.to(A.dtype) * W).flatten(1).sum(1), magnitude)
            if c is not None:  # W' = c∘(W + s·B·A), c held constant but for m
                dW = dW * c.view(-1, *[1] * (dW.dim() - 1))  # of half precision float32, in passing
            dW = dW.to(A.dtype, memory_format=torch.contiguous_format)
            dA, dB = factors_gradient(dW, A, B, spec.scaling)
        return dX, None, db, dA, dB, dm, None, None, None, None
