"""The linear layer with a low-rank update as one autograd function, and the same in plain operations.

Shapes: x is (..., d_in), seen as (T, d_in); W is (d_out, d_in); A is (r, d_in); B is (d_out, r). With DoRA
c = m / ‖rows of W + s·B·A‖, held constant but for m. X̃ is x, or x with entries dropped. Then

    y  = x·(c∘(W + s·B·A))ᵀ + b                     merged, or
    y  = x·(c∘W)ᵀ + b + s·Hᵀ·(c∘B)ᵀ                 with a branch
    H  = A·X̃ᵀ,  G = (c∘B)ᵀ·dYᵀ                      (r, T)
    dA = s·G·X̃,  dB = s·c∘(H·dY)ᵀ,  dX = dY·(c∘W) + s·Gᵀ·A,  dm = (dY∘(y - b)).sum(0) / m

and no gradient of W's shape is ever formed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.common import (
    autocasts,
    cast,
    chunks,
    graph_gradients,
    pieces,
)
from lora_lightning.kernels.dora import as_it_was, magnitude_gradient, row_norms, watched
from lora_lightning.kernels.dropout import masked
from lora_lightning.kernels.factors import factor_gradients, low_rank
from lora_lightning.kernels.half import shared_out, times
from lora_lightning.kernels.linear_form import LinearSpec, plain
from lora_lightning.kernels.sources import RecomputeSource


class LoRALinearFunction(torch.autograd.Function):
    """`plain` with the gradients above; a second derivative is taken through `plain` itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor | None,
        mask: Tensor | None,
        spec: LinearSpec,
        source: RecomputeSource | None,
    ) -> Tensor:
        """Args beyond those of `plain`:
        mask: bool, of x's shape, true where an entry of x is kept; None without dropout.
        source: what the backward makes x from; None saves x.
        """
        y, low, H, factors, divided = forward(x, W, bias, A, B, magnitude, mask, spec)
        ctx.spec, ctx.compute = spec, None
        kept: tuple[Tensor | None, ...] = (low,)
        if source is not None:
            ctx.compute, ctx.rowwise = source.compute, len(source.rowwise)
            kept = (*source.rowwise, *source.shared)
        ctx.watched = None if magnitude is None else watched(y)  # which the next operation often saves too
        output = None if magnitude is None else y.data
        ctx.save_for_backward(W, bias, A, B, magnitude, factors, H, divided, mask, output, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable(ctx, dY)
        if autocasts(dY.device.type):
            with torch.autocast(dY.device.type, enabled=False):
                return LoRALinearFunction.backward(ctx, dY)
        W, bias, A, B, magnitude, factors, H, divided, mask, y, *kept = ctx.saved_tensors
        spec: LinearSpec = ctx.spec
        x = _input(ctx, kept)
        needs_x, _, needs_bias, needs_A, needs_B, needs_m = ctx.needs_input_grad[:6]
        dX = dm = dbias = None
        dY2 = dY.reshape(-1, dY.shape[-1])  # (T, d_out)
        up = B if factors is None else B * factors[:, None]
        G, dA, dB = factor_gradients(
            dY2,
            cast(up.t(), spec.dtype).contiguous(),
            cast(A, spec.dtype),
            H,
            mask,
            x,
            spec.scaling / spec.keep,
            (needs_x and not spec.merged_back, needs_A, needs_B),
        )
        if dA is not None:
            dA = dA.to(A.dtype)
        if dB is not None:
            dB = dB.to(B.dtype) if factors is None else dB * factors[:, None]
            dB = dB if divided is None else times(dB, divided)
        if needs_bias or needs_m:
            dbias = dY2.sum(0)
        if needs_m:
            if not as_it_was(ctx.watched):
                whole = x.whole() if isinstance(x, RecomputeSource) else x
                y = forward(whole, W, bias, A, B, magnitude, mask, spec)[0]
            dm = _sum_of_products(dY2, y.view(dY2.shape))
            dm = magnitude_gradient(dm if bias is None else dm.sub_(dbias * bias), magnitude)
        if needs_x:
            dX = _input_gradient(dY2, G, cast(W, spec.dtype), A, B, factors, mask, spec)
            dX = dX.view(*dY.shape[:-1], W.shape[1])
        ctx.watched = None
        return dX, None, dbias if needs_bias else None, dA, dB, dm, None, None, None


def forward(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    mask: Tensor | None,
    spec: LinearSpec,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, x in the products' dtype, H with a branch, c with DoRA, and in float16 what H is divided by."""
    if spec.autocast:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x, W, bias, A, B, magnitude, mask, spec._replace(autocast=False))
    dtype = spec.dtype
    low, weight = x.to(dtype), cast(W, dtype)
    bias = None if bias is None else bias.to(dtype)
    factors = H = divided = None
    if spec.merged or magnitude is not None:
        weight, factors = _effective(weight, A, B, magnitude, spec)
    if spec.merged:
        y = F.linear(low, weight, bias).contiguous()
    else:
        tokens = low.reshape(-1, W.shape[1])  # (T, d_in)
        up = B if factors is None else B * factors[:, None]
        down, up, divided = shared_out(A, up, spec.scaling / spec.keep, dtype)
        H, up = low_rank(down.to(dtype), tokens, mask), up.to(dtype)
        if spec.begins:
            rows, columns = H, up
            if bias is not None:  # ones under H and b beside s·B: writing b alone takes as long
                rows = torch.cat([H, H.new_ones(1, H.shape[1])])
                columns = torch.cat([up, bias[:, None]], dim=1)
            y = (rows.t() @ columns.t()).addmm_(tokens, weight.t()).view(*low.shape[:-1], W.shape[0])
        else:
            y = F.linear(low, weight, bias).contiguous()
            y.view(-1, W.shape[0]).addmm_(H.t(), up.t())
    # as a view it could not be changed in place
    return y.data, low, H, factors, divided


def _effective(
    weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, spec: LinearSpec
) -> tuple[Tensor, Tensor | None]:
    """W + s·B·A, or with DoRA c∘(W + s·B·A), or c∘W where it is not to be merged; and c."""
    sum_ = torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=spec.scaling)
    if magnitude is None:
        return sum_, None
    factors = magnitude / row_norms(sum_)
    return (sum_.mul_(factors[:, None]) if spec.merged else weight * factors[:, None]), factors


def _sum_of_products(one: Tensor, other: Tensor) -> Tensor:
    """(one∘other).sum(0), a few tokens at a time."""
    sizes, _ = chunks(len(one), one.shape[1], one)
    total = one.new_zeros(one.shape[1])
    for a, b in zip(pieces(one, sizes), pieces(other, sizes), strict=True):
        total += (a * b).sum(0)
    return total


def _input_gradient(
    dY: Tensor,
    G: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    factors: Tensor | None,
    mask: Tensor | None,
    spec: LinearSpec,
) -> Tensor:
    """dX, (T, d_in): by the sum of W and its update where there is no G, else by each. The small product
    comes first and the large one is added onto it: the other order reads and writes dX once more."""
    if G is None:
        weight = torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=spec.scaling)
        return dY @ (weight if factors is None else weight.mul_(factors[:, None]))
    down = A.to(weight.dtype) * (spec.scaling / spec.keep)
    if mask is None:
        dX = G.t() @ down
    else:
        dX = dY.new_empty(mask.numel() // weight.shape[1], weight.shape[1])
        sizes, _ = chunks(len(dX), dX.shape[1], dX)
        for x, g, m in zip(*(pieces(t, sizes) for t in (dX, G.t(), mask.view(dX.shape))), strict=True):
            masked(g @ down, m, out=x)
    return dX.addmm_(dY, weight if factors is None else weight * factors[:, None])


def _input(ctx: Any, kept: list[Tensor]) -> Tensor | RecomputeSource:
    """x, or what it can be made from."""
    if ctx.compute is None:
        return kept[0]
    return RecomputeSource(tuple(kept[: ctx.rowwise]), tuple(kept[ctx.rowwise :]), ctx.compute)


def _differentiable(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions of dY and of the inputs."""
    W, bias, A, B, magnitude, _, _, _, mask, _, *kept = ctx.saved_tensors
    source = _input(ctx, kept)
    x = source.whole() if isinstance(source, RecomputeSource) else source
    dropped = x if mask is None else x * mask / ctx.spec.keep
    y = plain(x, W, bias, A, B, magnitude, ctx.spec.scaling, dropped)
    return *graph_gradients(y, (x, W, bias, A, B, magnitude), ctx.needs_input_grad[:6], dY), None, None, None
