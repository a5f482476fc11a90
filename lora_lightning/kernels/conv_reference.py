"""A convolution with an update in plain operations, and what its autograd functions share."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import compiled
from lora_lightning.kernels.common import cast, graph_gradients
from lora_lightning.kernels.conv_products import ConvSpec, convolve, expand, per_channel
from lora_lightning.kernels.dora import row_factors, row_norms, scaled_change
from lora_lightning.kernels.dropout import scale
from lora_lightning.kernels.half import shared_out
from lora_lightning.kernels.sources import RecomputeSource
from lora_lightning.kernels.weights import factor_groups, sum_of, update_of


def summed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    spec: ConvSpec,
) -> Tensor:
    """conv(x, W + s·B·A) in plain operations, with a dense gradient of the weight; without a magnitude."""
    return convolve(x, sum_of(weight, A, B, spec.scaling).to(x.dtype), bias, spec)


def formed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    spec: ConvSpec,
) -> Tensor:
    """conv(x, W') with the W' that a compiler is given."""
    return convolve(x, compiled.effective(weight, A, B, magnitude, spec.scaling, x.dtype), bias, spec)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    spec: ConvSpec,
    mask: Tensor | None = None,
) -> Tensor:
    """The same in plain autograd; `mask` is what a dropout that is done already has kept."""
    if spec.rows is not None:
        weight, B, magnitude = times_rows(spec.rows, weight, B, magnitude)
    y = convolve(x, cast(weight, x.dtype), bias, spec)
    kept = x
    if spec.dropout:
        kept = F.dropout(x, spec.dropout) if mask is None else x * mask * scale(spec.dropout)
    if factor_groups(A, B) != spec.groups:  # across the channels: the update is as small as the weight
        change = convolve(kept, update_of(weight, A, B, spec.scaling).to(x.dtype), None, spec)
    else:
        down, up, _ = shared_out(A, B, spec.scaling, x.dtype)
        change = expand(convolve(kept, cast(down, x.dtype), None, spec), cast(up, x.dtype), spec)
    if magnitude is not None:
        c = per_channel(row_factors(magnitude, weight, A, B, spec.scaling), spec)
        change = scaled_change(c, y if bias is None else y - per_channel(bias, spec), change)
    return y + change


def by_the_reference(
    ctx: Any, dY: Tensor, inputs: tuple[Any, ...], mask: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of dY and of the inputs."""
    x, weight, bias, A, B, magnitude = inputs
    y = reference(x, weight, bias, A, B, magnitude, ctx.spec, mask)
    return *graph_gradients(y, inputs, ctx.needs_input_grad[:6], dY), None, None, None, None


def times_rows(
    rows: Tensor, weight: Tensor, B: Tensor, magnitude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """W, B and DoRA's m that make rows∘W', in plain operations: m goes with norms, which have no sign."""
    weight = weight.to(rows.dtype) * rows.view(-1, *[1] * (weight.dim() - 1))
    return weight, B * rows.unsqueeze(1), None if magnitude is None else magnitude * rows.abs()


def scaled_sum(
    weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, spec: ConvSpec
) -> tuple[Tensor, Tensor | None]:
    """W' = c∘(W + s·B·A) in A's dtype and c, (out,): DoRA's magnitudes by the norms of the rows, times
    `spec.rows`; None for ones."""
    W, c = sum_of(weight, A, B, spec.scaling), spec.rows
    if magnitude is not None:
        c = magnitude / row_norms(W) if c is None else magnitude / row_norms(W) * c
    return (W if c is None else W * c.view(-1, *[1] * (W.dim() - 1))), c


def save(ctx: Any, x: Tensor, source: RecomputeSource | None, *tensors: Tensor | None) -> None:
    """Keep x, or what it can be made from, and the other tensors."""
    kept = (x,) if source is None else (*source.rowwise, *source.shared)
    ctx.compute, ctx.dtype, ctx.count = source and source.compute, x.dtype, len(tensors)
    ctx.save_for_backward(*tensors, *kept)


def saved(ctx: Any) -> tuple[Any, ...]:
    """x and the tensors that `save` was given."""
    tensors = ctx.saved_tensors
    kept = tensors[ctx.count :]
    x = kept[0] if ctx.compute is None else ctx.compute(*kept, None).to(ctx.dtype)
    return x, *tensors[: ctx.count]
