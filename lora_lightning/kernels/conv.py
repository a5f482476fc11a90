"""The fast path of convolutions, conv(x, W) + s·B·conv(x, A), and its reference in plain autograd.

A step takes one of four forms, by a rule over its shapes (`choose_form`):

- "summed", where x and y are small and calls would take longer than what they compute: W' = W + s·B·A as the
  convolution's weight in plain operations, and for a W that is not small too the reference itself.
- "dense": W' = W + s·B·A is the convolution's weight, and its dense gradient gives those of A and B.
  Where a weight is no larger than its factors, depthwise and most grouped convolutions; and for DoRA
  with a bias.
- "merged": W' forward and for dX; with G = s·Bᵀ·dY, dA comes from G and x, dB from dY and conv(x, A).
- "branch": W and the factors apart, where making W' would move more memory than the low-rank passes do.

1×1 kernels, and on the CPU others with stride 1, take matrix products (`products`) for the factors, and
1×1 kernels for dX: oneDNN's convolutions need 1.1 to 5 times as long for the shapes of a ResNet-50.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lora_lightning.kernels import sources
from lora_lightning.kernels.common import cast, graph_gradients, is_plain
from lora_lightning.kernels.conv_products import (
    B_gradient,
    ConvSpec,
    add_expanded,
    convolve,
    dense_in,
    expand,
    expand_transposed,
    gradients,
    is_pointwise,
    memory_format,
    per_channel,
    reduce,
    reduce_gradients,
    sample,
    scale,
    unsample,
)
from lora_lightning.kernels.dora import magnitude_gradient, row_factors, row_norms, scaled_change
from lora_lightning.kernels.dropout import keep_mask, masked
from lora_lightning.kernels.half import shared_out, times
from lora_lightning.kernels.linear_form import DENSE
from lora_lightning.kernels.sources import RecomputeSource
from lora_lightning.kernels.weights import factor_groups, factors_gradient, sum_of, update_of

SMALL = 2**19  # numbers in x and y together, up to which plain operations are the fastest: docs/speed.md


def choose_form(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    stride: Sequence[int],
    groups: int,
    dropout: float,
    dtype: torch.dtype,
    implementation: str,
) -> str:
    """The rule, a key of `FORMS`. With T positions (batch times output) and N numbers in W, the factored
    gradients take 4·T·r·(columns + out) operations a group, the dense one 2·T·columns·out. Merging, twice a
    step, moves 4·N numbers; the branch 2·T·(in + out), for it adds to the output and to dX. Half precision
    never merges: the small updates of the first steps would be rounded away.

    Args:
        dtype: of the products.
    """
    if implementation == "reference" or weight.requires_grad or not x.numel():
        return "reference"
    if not is_plain(x, weight, bias, A, B, magnitude):
        return "reference"
    positions = x.shape[0]
    for size, step in zip(x.shape[2:], stride, strict=True):
        positions *= size // step
    moved, size, dora = positions * (x.shape[1] + weight.shape[0]), weight.numel(), magnitude is not None
    branches = dtype.itemsize < 4 or dropout > 0
    differentiates = torch.is_grad_enabled()
    again = differentiates and x.nbytes >= sources.LEAST  # such an input may not have to be kept
    small = moved < SMALL and not again
    if small and implementation == "auto" and not dora:
        fits = size <= DENSE or (2 * moved >= size and not differentiates)
        return "summed" if fits and not branches else "reference"
    rank, across = B.shape[1], A.shape[0] != groups * B.shape[1]
    if dora or across:
        if branches:
            return "reference"
        if across:
            return "dense"
    rows = weight.shape[0] // groups
    columns = size // weight.shape[0]
    if 2 * rank * (rows + columns) >= rows * columns and not branches:
        return "dense"
    if dora:  # y / m is what its magnitudes' gradients are made from; y - b may have lost its digits
        return "merged" if bias is None else "dense"
    return "branch" if branches or moved < 2 * size else "merged"


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
    y = convolve(x, cast(weight, x.dtype), bias, spec)
    kept = x
    if spec.dropout:
        kept = F.dropout(x, spec.dropout) if mask is None else x * mask * scale(spec)
    if factor_groups(A, B) != spec.groups:  # across the channels: the update is as small as the weight
        change = convolve(kept, update_of(weight, A, B, spec.scaling).to(x.dtype), None, spec)
    else:
        down, up, _ = shared_out(A, B, spec.scaling, x.dtype)
        change = expand(convolve(kept, cast(down, x.dtype), None, spec), cast(up, x.dtype), spec)
    if magnitude is not None:
        c = per_channel(row_factors(magnitude, weight, A, B, spec.scaling), spec)
        change = scaled_change(c, y if bias is None else y - per_channel(bias, spec), change)
    return y + change


class DenseConv(Function):
    """The form "dense"; arguments as of `reference`. It saves x alone and makes W' again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                magnitude: Tensor | None, spec: ConvSpec, source: RecomputeSource | None,
    ) -> Tensor:  # fmt: skip
        ctx.spec = spec
        _save(ctx, x, source, weight, bias, A, B, magnitude)
        W, _ = _scaled_sum(weight, A, B, magnitude, spec)
        return convolve(x, W.to(x.dtype), bias, spec)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, magnitude = _saved(ctx)
        spec: ConvSpec = ctx.spec
        if torch.is_grad_enabled():
            return _by_the_reference(ctx, dY, (x, weight, bias, A, B, magnitude), None)
        x, dY = dense_in(memory_format(x), x, dY)
        W, norms = _scaled_sum(weight, A, B, magnitude, spec)
        factors = any(ctx.needs_input_grad[3:6])
        dX, dW = gradients(dY, x, W.to(x.dtype), spec, ctx.needs_input_grad[0], factors)
        dA = dB = dm = None
        if dW is not None:
            dW = dW.to(A.dtype)
            if magnitude is not None and norms is not None:  # W' = m / norm · V; the norm is held constant
                V = sum_of(weight, A, B, spec.scaling)
                dm = (dW * V).flatten(1).sum(1) / norms
                dW = dW * (magnitude / norms).view(-1, *[1] * (dW.dim() - 1))
            dA, dB = factors_gradient(dW, A, B, spec.scaling)
        return dX, None, _bias_gradient(ctx, dY), dA, dB, dm, None, None


class FactoredConv(Function):
    """The forms "merged" and "branch"; arguments as of `reference`. It saves x; with the branch also
    conv(x, A), whose channels are few, and the mask of a dropout; with DoRA y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                magnitude: Tensor | None, spec: ConvSpec, source: RecomputeSource | None,
    ) -> Tensor:  # fmt: skip
        ctx.spec, ctx.watched = spec, None
        h = mask = divided = None
        if spec.form == "merged":
            W, _ = _scaled_sum(weight, A, B, magnitude, spec)
            y = convolve(x, W.to(x.dtype), bias, spec)
        else:
            y, kept = convolve(x, weight.to(x.dtype), bias, spec), x
            if spec.dropout:
                mask = keep_mask(x, spec.dropout)
                mask = mask.as_strided(x.shape, torch.empty_like(x, device="meta").stride())  # x's format
                kept = masked(x, mask)
            down, up, divided = shared_out(A, B, spec.scaling * scale(spec), x.dtype)
            h = reduce(kept, down.to(x.dtype), spec)
            y = add_expanded(y, h, up.to(x.dtype), spec)
        if magnitude is not None:
            # Saved as an output it could not be changed in place, as by ReLU(inplace=True): watched here.
            ctx.watched = y.detach(), y._version
        output = None if magnitude is None else y.data
        _save(ctx, x, source, weight, bias, A, B, magnitude, mask, h, divided, output)
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, magnitude, mask, h, divided, y = _saved(ctx)
        if torch.is_grad_enabled():
            return _by_the_reference(ctx, dY, (x, weight, bias, A, B, magnitude), mask)
        spec: ConvSpec = _branch_step(ctx.spec) if ctx.spec.dropout else ctx.spec
        need_x, _, _, need_A, need_B, need_m, *_ = ctx.needs_input_grad
        whole, (x, dY) = x, dense_in(memory_format(x), x, dY)
        if sampled := set(spec.stride) != {1} and is_pointwise(weight, spec):
            mask = None if mask is None else sample(mask, spec)
            x, spec = sample(x, spec), spec._replace(stride=(1,) * len(spec.stride))
        merged, low, high = spec.form == "merged", A.to(x.dtype), B
        kept = x if mask is None else masked(x, mask)
        dX = dA = dB = dm = norms = None
        if merged and (need_x or magnitude is not None):
            weight, norms = _scaled_sum(weight, A, B, magnitude, spec)
        if need_x:
            dX, _ = gradients(dY, x, weight.to(x.dtype), spec, True, False)
        if norms is not None:  # W' = c · (W + s·B·A), c = m / norm held constant but for m
            c = (magnitude / norms).unsqueeze(1)
            high = B * c
        if need_B:
            dB = B_gradient(dY, reduce(kept, low, spec) if h is None else h, spec).to(B.dtype)
            dB = dB if norms is None else dB * c
            dB = dB if divided is None else times(dB, divided)
        if need_m:
            if ctx.watched[0]._version != ctx.watched[1]:
                y = convolve(x, weight, bias, spec)
            sums = torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(dY, y, strict=True)]).sum(0)
            dm = magnitude_gradient(sums, magnitude)
        if need_A or (need_x and not merged):
            G = expand_transposed(dY, high.to(x.dtype), spec)  # (n, groups·r, *out)
            change, dA = reduce_gradients(G, kept, low, spec, need_x and not merged)
            if dX is not None and change is not None:
                dX = dX.add_(change if mask is None else masked(change, mask))
            dA = None if dA is None else dA.to(A.dtype)
        if dX is not None and sampled:
            dX = unsample(dX, whole, ctx.spec)
        return dX, None, _bias_gradient(ctx, dY), dA, dB, dm, None, None


# A step's form -> its function, of the arguments of `reference`; the others also get x's source.
PLAIN_FORMS = ("summed", "reference")
FORMS: dict[str, Callable[..., Tensor]] = {
    "summed": summed,
    "reference": reference,
    "dense": DenseConv.apply,
    "merged": FactoredConv.apply,
    "branch": FactoredConv.apply,
}


def _branch_step(spec: ConvSpec) -> ConvSpec:
    """With the dropout's 1 / (1 - p) in the scaling, which spares a pass over x."""
    return spec._replace(scaling=spec.scaling * scale(spec))


def _scaled_sum(
    weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, spec: ConvSpec
) -> tuple[Tensor, Tensor | None]:
    """W + s·B·A, with DoRA its rows scaled to the magnitudes; and their norms before."""
    W = sum_of(weight, A, B, spec.scaling)
    if magnitude is None:
        return W, None
    norms = row_norms(W)
    return W * (magnitude / norms).view(-1, *[1] * (W.dim() - 1)), norms


def _save(ctx: Any, x: Tensor, source: RecomputeSource | None, *tensors: Tensor | None) -> None:
    """Keep x, or what it can be made from, and the other tensors."""
    kept = (x,) if source is None else (*source.rowwise, *source.shared)
    ctx.compute, ctx.dtype, ctx.count = source and source.compute, x.dtype, len(tensors)
    ctx.save_for_backward(*tensors, *kept)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """x and the tensors that `_save` was given."""
    tensors = ctx.saved_tensors
    kept = tensors[ctx.count :]
    x = kept[0] if ctx.compute is None else ctx.compute(*kept, None).to(ctx.dtype)
    return x, *tensors[: ctx.count]


def _by_the_reference(
    ctx: Any, dY: Tensor, inputs: tuple[Any, ...], mask: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of dY and of the inputs."""
    x, weight, bias, A, B, magnitude = inputs
    y = reference(x, weight, bias, A, B, magnitude, ctx.spec, mask)
    return *graph_gradients(y, inputs, ctx.needs_input_grad[:6], dY), None, None


def _bias_gradient(ctx: Any, dY: Tensor) -> Tensor | None:
    return dY.sum([d for d in range(dY.dim()) if d != 1]) if ctx.needs_input_grad[2] else None
