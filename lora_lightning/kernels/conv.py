"""The fast path of convolutions, conv(x, W) + s·B·conv(x, A), and its forms.

A step takes one of five forms, by a rule over its shapes (`conv_form.choose_form`):

- "summed", where x and y are small and calls would take longer than what they compute: W' = W + s·B·A as the
  convolution's weight in plain operations, and for a W that is not small too the reference itself.
- "dense": W' = W + s·B·A is the convolution's weight, and its dense gradient gives those of A and B.
  On a CPU where a weight is no larger than its factors, depthwise and most grouped convolutions, and for DoRA
  with a bias; elsewhere nearly always.
- "merged": W' forward and for dX; with G = s·Bᵀ·dY, dA comes from G and x, dB from dY and conv(x, A).
- "branch": W and the factors apart, on a CPU: with dropout, in half precision, and where making W' would move
  more memory than the low-rank passes do. "dropped" is the same with dropout elsewhere.

On a CPU 1×1 kernels, and others with stride 1, take matrix products (`products`) for the factors, and
1×1 kernels for dX: oneDNN's convolutions need 1.1 to 5 times as long for the shapes of a ResNet-50.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lora_lightning.kernels.conv_dense import DenseConv
from lora_lightning.kernels.conv_dropped import DroppedConv
from lora_lightning.kernels.conv_products import (
    B_gradient,
    ConvSpec,
    add_expanded,
    bias_gradient,
    convolve,
    convolve_merged,
    dense_in,
    expand_transposed,
    gradients,
    is_pointwise,
    memory_format,
    reduce,
    reduce_gradients,
    sample,
    unsample,
)
from lora_lightning.kernels.conv_reference import (
    by_the_reference,
    formed,
    reference,
    save,
    saved,
    scaled_sum,
    summed,
)
from lora_lightning.kernels.dora import as_it_was, magnitude_gradient, watched
from lora_lightning.kernels.dropout import keep_mask, masked, scale
from lora_lightning.kernels.half import shared_out, times
from lora_lightning.kernels.merge_whole import Whole
from lora_lightning.kernels.sources import RecomputeSource
from lora_lightning.kernels.together import Together


class FactoredConv(Function):
    """The forms "merged" and "branch"; arguments as of `DenseConv`. It saves x; with the branch also
    conv(x, A), whose channels are few, and the mask of a dropout; with DoRA y; and a W' that was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                magnitude: Tensor | None, spec: ConvSpec, source: RecomputeSource | None, whole: Whole | None,
                together: Together | None,
    ) -> Tensor:  # fmt: skip
        ctx.spec, ctx.together, ctx.watched = spec, together, None
        h = mask = divided = formed = factors = None
        if whole is not None:
            formed, factors = whole
            y = convolve_merged(x, formed, bias, spec)
        elif spec.form == "merged":
            y = convolve(x, scaled_sum(weight, A, B, magnitude, spec)[0].to(x.dtype), bias, spec)
        else:
            y, kept = convolve(x, weight.to(x.dtype), bias, spec), x
            if spec.dropout:
                mask = keep_mask(x, spec.dropout)
                mask = mask.as_strided(x.shape, torch.empty_like(x, device="meta").stride())  # x's format
                kept = masked(x, mask)
            down, up, divided = shared_out(A, B, _branch_step(spec).scaling, x.dtype)
            h = reduce(kept, down.to(x.dtype), spec)
            y = add_expanded(y, h, up.to(x.dtype), spec)
        if magnitude is not None:
            ctx.watched = watched(y)
        output = None if magnitude is None else y.data
        save(ctx, x, source, weight, bias, A, B, magnitude, mask, h, divided, output, formed, factors)
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, magnitude, mask, h, divided, y, formed, c = saved(ctx)
        if ctx.together is not None:
            ctx.together.release()
        if torch.is_grad_enabled():
            return by_the_reference(ctx, dY, (x, weight, bias, A, B, magnitude), mask)
        spec: ConvSpec = _branch_step(ctx.spec) if mask is not None else ctx.spec
        need_x, _, _, need_A, need_B, need_m, *_ = ctx.needs_input_grad
        whole, (x, dY) = x, dense_in(memory_format(x), x, dY)
        if sampled := set(spec.stride) != {1} and is_pointwise(weight, spec):
            mask = None if mask is None else sample(mask, spec)
            x, spec = sample(x, spec), spec._replace(stride=(1,) * len(spec.stride))
        merged, low, high = spec.form == "merged", A.to(x.dtype), B
        kept = x if mask is None else masked(x, mask)
        dX = dA = dB = dm = None
        if formed is not None:
            weight = formed
        elif merged and (need_x or magnitude is not None or spec.rows is not None):
            weight, c = scaled_sum(weight, A, B, magnitude, spec)
        if need_x:
            dX, *_ = gradients(dY, x, weight.to(x.dtype), spec, True, False)
        if c is not None:  # W' = c∘(W + s·B·A), c held constant but for m
            c = c.unsqueeze(1)
            high = B * c
        if need_B:
            dB = B_gradient(dY, reduce(kept, low, spec) if h is None else h, B, spec)
            dB = dB if c is None else dB * c
            dB = dB if divided is None else times(dB, divided)
        if need_m:
            if not as_it_was(ctx.watched):
                y = convolve(x, weight, bias, spec)
            sums = torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(dY, y, strict=True)]).sum(0)
            dm = magnitude_gradient(sums, magnitude)
        if need_A or (need_x and not merged):
            G = expand_transposed(dY, high, spec)  # (n, groups·r, *out)
            change, dA = reduce_gradients(G, kept, low, spec, need_x and not merged)
            if dX is not None and change is not None:
                dX = dX.add_(change if mask is None else masked(change, mask))
            dA = None if dA is None else dA.to(A.dtype)
        if dX is not None and sampled:
            dX = unsample(dX, whole, ctx.spec)
        return dX, None, bias_gradient(dY, ctx.needs_input_grad[2]), dA, dB, dm, None, None, None, None


# A step's form -> its function, of the arguments of `reference`, and those but the plain ones of `DenseConv`.
PLAIN_FORMS = ("summed", "formed", "reference")
FORMS: dict[str, Callable[..., Tensor]] = {
    "summed": summed,
    "formed": formed,
    "reference": reference,
    "dense": DenseConv.apply,
    "merged": FactoredConv.apply,
    "branch": FactoredConv.apply,
    "dropped": DroppedConv.apply,
}


def _branch_step(spec: ConvSpec) -> ConvSpec:
    """With the dropout's 1 / (1 - p) in the scaling, which spares a pass over x."""
    return spec._replace(scaling=spec.scaling * scale(spec.dropout))
