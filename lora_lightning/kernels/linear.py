"""The linear layer with a low-rank update as one autograd function, and the same in plain operations.

Shapes: x is (..., d_in), seen as (T, d_in); W is (d_out, d_in); A is (r, d_in); B is (d_out, r). With DoRA
c = m / ‖rows of W + s·B·A‖, held constant but for m. X̃ is x, or x with entries dropped. Then

    y  = x·(c∘(W + s·B·A))ᵀ + b                     merged, or
    y  = x·(c∘W)ᵀ + b + s·(X̃·Aᵀ)·(c∘B)ᵀ             with a branch
    G  = dY·(c∘B)                                   (T, r)
    dA = s·Gᵀ·X̃,  dB = s·c∘(dYᵀ·(X̃·Aᵀ)),  dX = dY·(c∘W) + s·G·A,  dm = (dY∘(y - b)).sum(0) / m

and no gradient of W's shape is ever formed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import (
    cast,
    chunks,
    magnitude_gradient,
    masked,
    pieces,
    row_norms,
    without_autocast,
)
from lora_lightning.kernels.sources import Source

MERGE_FROM = 2  # fresh memory for W' costs about as much again as the sum


def merges(touched: int, size: int, dtype: torch.dtype) -> bool:
    """Whether to form W + s·B·A, of `size` = d_in·d_out numbers, rather than to add a branch.

    Args:
        touched: numbers that a branch would touch: T·(d_in + d_out) in the forward, where it reads x and
            adds to y; T·d_in in the backward, where it adds to dX.
        dtype: in half precision never, where the small updates of the first steps would be rounded away.
    """
    return dtype in (torch.float32, torch.float64) and touched > MERGE_FROM * size


def plain(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    dropped: Tensor,
) -> Tensor:
    """The reference, in operations that autograd, compilers and function transforms know.

    Args:
        dropped: X̃.
    """
    branch = F.linear(F.linear(dropped, cast(A, x.dtype)) * scaling, cast(B, x.dtype))
    if magnitude is None:
        return F.linear(x, W, bias) + branch
    with torch.no_grad(), without_autocast(x.device.type):
        norms = row_norms(cast(W, A.dtype) + scaling * B @ A)
    y = (F.linear(x, W) + branch) * (magnitude / norms).to(branch.dtype)
    return y if bias is None else y + bias.to(y.dtype)


class Options(NamedTuple):
    """What the function is called with besides tensors.

    Attributes:
        scaling: s.
        keep: 1 - the probability of dropping.
        merged: take this road in both directions; None goes by `merges`.
        dtype: of the products.
    """

    scaling: float
    keep: float
    merged: bool | None
    dtype: torch.dtype


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
        options: Options,
        source: Source,
    ) -> Tensor:
        """Args beyond those of `plain`:
        mask: bool, of x's shape, true where an entry of x is kept; None without dropout.
        source: where the backward gets x from.
        """
        with without_autocast(x.device.type):
            y, low, XA, factors = forward(x, W, bias, A, B, magnitude, mask, options)
        if source.is_input:
            source = replace(source, rowwise=(low,))
        ctx.options = options
        ctx.compute, ctx.rowwise = source.compute, len(source.rowwise)
        # DoRA needs y, which the next operation often saves too. Saved as an output it could not be
        # changed in place, as ReLU(inplace=True) does: it is saved as data and watched here.
        ctx.watched = None if magnitude is None else (y.detach(), y._version)
        ctx.save_for_backward(
            W, bias, A, B, magnitude, factors, XA, mask,
            None if magnitude is None else y.data, *source.rowwise, *source.shared,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        W, bias, A, B, magnitude, factors, XA, mask, y, *kept = ctx.saved_tensors
        scaling, keep, _, dtype = ctx.options
        rowwise, shared = kept[: ctx.rowwise], kept[ctx.rowwise :]
        needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            x = ctx.compute(*rowwise, *shared, None)
            dropped = x if mask is None else x * mask / keep
            return _differentiable(dY, (x, W, bias, A, B, magnitude), needs, scaling, dropped)
        needs_x, _, needs_bias, needs_A, needs_B, needs_m = needs
        dX = dA = dB = dm = dbias = None
        dY2 = dY.reshape(-1, dY.shape[-1])  # (T, d_out)
        with without_autocast(dY.device.type):
            up = B if factors is None else B * factors[:, None]
            down = cast(A, dtype).t().contiguous()
            made_from = Source(rowwise, shared, ctx.compute)
            G, dA, dB = _factor_gradients(
                dY2, cast(up, dtype), down, XA, mask, made_from, scaling / keep, (needs_A, needs_B)
            )
            if dA is not None:
                dA = cast(dA, A.dtype)
            if dB is not None:
                dB = cast(dB, B.dtype) if factors is None else dB * factors[:, None]
            if needs_bias or needs_m:
                dbias = dY2.sum(0)
            if needs_m:
                if ctx.watched is None or ctx.watched[0]._version != ctx.watched[1]:
                    x = ctx.compute(*rowwise, *shared, None)
                    y = forward(x, W, bias, A, B, magnitude, mask, ctx.options)[0]
                dm = _sum_of_products(dY2, y.view(dY2.shape))
                dm = magnitude_gradient(dm if bias is None else dm.sub_(dbias * bias), magnitude)
            if needs_x:
                dX = _input_gradient(dY2, G, cast(W, dtype), A, B, factors, mask, ctx.options)
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
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, x in the products' dtype, X̃·Aᵀ with a branch, and c with DoRA."""
    scaling, keep, merged, dtype = options
    low, factors, XA = cast(x, dtype), None, None
    rows = low.reshape(-1, W.shape[1])  # (T, d_in)
    merge = mask is None and (
        magnitude is not None or _choose(merged, len(rows) * sum(W.shape), W.numel(), dtype)
    )
    weight = cast(W, dtype)
    if merge or magnitude is not None:
        weight, factors = _effective(weight, A, B, magnitude, scaling, merge)
    y = F.linear(low, weight, None if bias is None else cast(bias, dtype)).contiguous()
    y = torch.ops.aten._unsafe_view.default(
        y, y.shape
    )  # autograd lets nobody change a view from a function in place
    if not merge:
        XA = _narrow(rows, mask, cast(A, dtype).t().contiguous())
        up = B if factors is None else B * factors[:, None]
        y.view(-1, W.shape[0]).addmm_(XA, cast(up, dtype).t(), alpha=scaling / keep)
    return y, low, XA, factors


def _narrow(x: Tensor, mask: Tensor | None, down: Tensor) -> Tensor:
    """X̃·down, (T, r), dropping a few rows at a time."""
    if mask is None:
        return x @ down
    XA = x.new_empty(x.shape[0], down.shape[1])
    step = chunks(len(x), x.shape[1], x)
    for part, kept, out in zip(*(pieces(t, step) for t in (x, mask.view(x.shape), XA)), strict=True):
        torch.mm(masked(part, kept), down, out=out)
    return XA


def _choose(merged: bool | None, touched: int, size: int, dtype: torch.dtype) -> bool:
    return merges(touched, size, dtype) if merged is None else merged


def _effective(
    W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, scaling: float, merge: bool
) -> tuple[Tensor, Tensor | None]:
    """W + s·B·A, or with DoRA c∘(W + s·B·A), or c∘W where it is not to be merged; and c."""
    sum_ = torch.addmm(W, cast(B, W.dtype), cast(A, W.dtype), alpha=scaling)
    if magnitude is None:
        return sum_, None
    factors = magnitude / row_norms(sum_)
    return (sum_.mul_(factors[:, None]) if merge else W * factors[:, None]), factors


def _factor_gradients(
    dY: Tensor,
    up: Tensor,
    down: Tensor,
    XA: Tensor | None,
    mask: Tensor | None,
    source: Source,
    alpha: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """G = dY·up, dA = α·Gᵀ·X̃ and dB = α·dYᵀ·XA with XA = X̃·down, in one pass over dY and x.

    The shapes of the small products are those that are fast in BLAS: a narrow matrix comes first and
    transposed, (r, T)·(T, d); the other way around takes up to six times as long.
    """
    (T, d_out), (d_in, r) = dY.shape, down.shape
    G = dY.new_empty(T, r)
    dA = dY.new_empty(r, d_in) if needs[0] else None
    dBt = dY.new_empty(r, d_out) if needs[1] else None
    reads_x = dA is not None or (dBt is not None and XA is None)
    step = chunks(T, max(d_in, d_out), dY)
    parts = [pieces(t.reshape(-1, t.shape[-1]), step) for t in source.rowwise]
    masks = None if mask is None else pieces(mask.view(T, d_in), step)
    buffer = dY.new_empty(min(step, T), d_in) if reads_x and not source.is_input else None
    beta = 0  # the first products overwrite what is there
    for i, (dy, g) in enumerate(zip(pieces(dY, step), pieces(G, step), strict=True)):
        torch.mm(dy, up, out=g)
        if reads_x:
            made = None if buffer is None else buffer[: len(dy)]
            X = cast(source.compute(*(part[i] for part in parts), *source.shared, made), dY.dtype)
            X = X if masks is None else masked(X, masks[i])
        if dA is not None:
            dA.addmm_(g.t(), X, beta=beta, alpha=alpha)
        if dBt is not None:
            xa = X @ down if XA is None else XA[i * step : i * step + len(dy)]
            dBt.addmm_(xa.t(), dy, beta=beta, alpha=alpha)
        beta = 1
    return G, dA, None if dBt is None else dBt.t()


def _sum_of_products(one: Tensor, other: Tensor) -> Tensor:
    """(one∘other).sum(0), a few rows at a time."""
    step = chunks(len(one), one.shape[1], one)
    total = one.new_zeros(one.shape[1])
    for a, b in zip(pieces(one, step), pieces(other, step), strict=True):
        total += (a * b).sum(0)
    return total


def _input_gradient(
    dY: Tensor,
    G: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    factors: Tensor | None,
    mask: Tensor | None,
    options: Options,
) -> Tensor:
    """dX, (T, d_in)."""
    scaling, keep, merged, _ = options
    if mask is None and _choose(merged, len(dY) * W.shape[1], W.numel(), dY.dtype):
        weight = torch.addmm(W, cast(B, W.dtype), cast(A, W.dtype), alpha=scaling)
        return dY @ (weight if factors is None else weight.mul_(factors[:, None]))
    dX = dY @ (W if factors is None else W * factors[:, None])
    if mask is None:
        return dX.addmm_(G, cast(A, W.dtype), alpha=scaling)
    step = chunks(len(dX), dX.shape[1], dX)
    for x, g, m in zip(*(pieces(t, step) for t in (dX, G, mask.view(dX.shape))), strict=True):
        x.add_(masked(g @ cast(A, W.dtype), m), alpha=scaling / keep)
    return dX


def _differentiable(
    dY: Tensor,
    inputs: tuple[Any, ...],
    needs: tuple[bool, ...],
    scaling: float,
    dropped: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of dY and of the inputs, for a derivative of them."""
    x, W, bias, A, B, magnitude = inputs
    y = plain(x, W, bias, A, B, magnitude, scaling, dropped)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dY, create_graph=True))
    return *(next(found) if need else None for need in needs), None, None, None
