"""The linear layer with a low-rank update as one autograd function, and the same in plain operations.

Shapes: x is (..., d_in), seen as (T, d_in); W is (d_out, d_in); A is (r, d_in); B is (d_out, r). With DoRA
c = m / ‖rows of W + s·B·A‖, held constant but for m. X̃ is x, or x with entries dropped. Then

    y  = x·(c∘(W + s·B·A))ᵀ + b                     merged, or
    y  = x·(c∘W)ᵀ + b + (X̃·s·Aᵀ)·(c∘B)ᵀ             with a branch
    G  = dY·(s·c∘B)                                 (T, r)
    dA = Gᵀ·X̃,  dB = c∘(dYᵀ·(X̃·s·Aᵀ)),  dX = dY·(c∘W) + G·A,  dm = (dY∘(y - b)).sum(0) / m

and no gradient of W's shape is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import chunks, row_norms, without_autocast
from lora_lightning.kernels.sources import Source

# Forming W' touches d_in·d_out numbers, the branch in place T·d_out in the forward and T·d_in in the
# backward; and fresh memory for W' costs about as much again.
MERGE_FROM = 2


def merges(tokens: int, features: int, dtype: torch.dtype) -> bool:
    """Whether to form W + s·B·A rather than to add a branch: above 2 · `features` tokens, the features
    being d_in in the forward and d_out in the backward.

    Never in half precision, where the small updates of the first steps would be rounded away.
    """
    return dtype in (torch.float32, torch.float64) and tokens > MERGE_FROM * features


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
    branch = F.linear(F.linear(dropped, A.to(x.dtype)) * scaling, B.to(x.dtype))
    if magnitude is None:
        return F.linear(x, W, bias) + branch
    with torch.no_grad(), without_autocast(x.device.type):
        norms = row_norms(W.to(A.dtype) + scaling * B @ A)
    y = (F.linear(x, W) + branch) * (magnitude / norms).to(branch.dtype)
    return y if bias is None else y + bias.to(y.dtype)


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
        scaling: float,
        keep: float,
        mask: Tensor | None,
        merged: bool | None,
        source: Source,
        dtype: torch.dtype,
    ) -> Tensor:
        """Args beyond those of `plain`:
        keep: 1 - the probability of dropping.
        mask: bool, of x's shape, true where an entry of x is kept; None without dropout.
        merged: take this road in both directions; None goes by `merges`.
        source: where the backward gets x from.
        dtype: of the products.
        """
        with without_autocast(x.device.type):
            y, low, XA, factors = forward(
                x, W, bias, A, B, magnitude, scaling, keep, mask, merged, dtype, need_XA=B.requires_grad
            )
        if source.is_input:
            source = replace(source, rowwise=(low,))
        ctx.options = scaling, keep, merged, dtype
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
        scaling, keep, merged, dtype = ctx.options
        rowwise, shared = kept[: ctx.rowwise], kept[ctx.rowwise :]
        needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            x = ctx.compute(*rowwise, *shared)
            dropped = x if mask is None else x * mask / keep
            return _differentiable(dY, (x, W, bias, A, B, magnitude), needs, scaling, dropped)
        needs_x, _, needs_bias, needs_A, needs_B, needs_m = needs
        dX = dA = dB = dm = dbias = None
        dY2 = dY.reshape(-1, dY.shape[-1])  # (T, d_out)
        with without_autocast(dY.device.type):
            up = (B if factors is None else B * factors[:, None]) * (scaling / keep)
            G, dA, dB = _factor_gradients(
                dY2, up.to(dtype), XA if needs_B else None, mask, needs_A,
                partial(_rows, ctx.compute, rowwise, shared, dtype), W.shape[1],
            )  # fmt: skip
            if dB is not None:
                dB = dB.to(B.dtype) if factors is None else dB * factors[:, None]
            if needs_bias or needs_m:
                dbias = dY2.sum(0)
            if needs_m:
                if ctx.watched is None or ctx.watched[0]._version != ctx.watched[1]:
                    x = ctx.compute(*rowwise, *shared)
                    y = forward(x, W, bias, A, B, magnitude, scaling, keep, mask, merged, dtype)[0]
                dm = _sum_of_products(dY2, y.view(dY2.shape))
                dm = (dm if bias is None else dm.sub_(dbias * bias)) / magnitude
            if needs_x:
                dX = _input_gradient(dY2, G, W.to(dtype), A, B, factors, scaling, mask, merged)
                dX = dX.view(*dY.shape[:-1], W.shape[1])
        ctx.watched = None
        return dX, None, dbias if needs_bias else None, dA, dB, dm, *[None] * 6


def forward(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    keep: float,
    mask: Tensor | None,
    merged: bool | None,
    dtype: torch.dtype,
    need_XA: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, x in the products' dtype, s·X̃·Aᵀ where it is made, and c with DoRA."""
    low, factors, XA = x.to(dtype), None, None
    rows = low.reshape(-1, W.shape[1])  # (T, d_in)
    merge = mask is None and (magnitude is not None or _choose(merged, len(rows), W.shape[1], dtype))
    weight = W.to(dtype)
    if merge or magnitude is not None:
        weight, factors = _effective(weight, A, B, magnitude, scaling, merge)
    y = F.linear(low, weight, None if bias is None else bias.to(dtype))
    if need_XA or not merge:
        X = rows if mask is None else rows * mask.view(rows.shape)
        XA = X @ (A * (scaling / keep)).to(dtype).t().contiguous()  # (T, r)
    if not merge:
        y = y.contiguous()
        up = B if factors is None else B * factors[:, None]
        y.view(-1, W.shape[0]).addmm_(XA, up.to(dtype).t())  # type: ignore[arg-type]
    return y, low, XA, factors


def _choose(merged: bool | None, tokens: int, features: int, dtype: torch.dtype) -> bool:
    return merges(tokens, features, dtype) if merged is None else merged


def _effective(
    W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, scaling: float, merge: bool
) -> tuple[Tensor, Tensor | None]:
    """W + s·B·A, or with DoRA c∘(W + s·B·A), or c∘W where it is not to be merged; and c."""
    sum_ = torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=scaling)
    if magnitude is None:
        return sum_, None
    factors = magnitude / row_norms(sum_)
    return (sum_.mul_(factors[:, None]) if merge else W * factors[:, None]), factors


def _rows(
    compute: Callable[..., Tensor],
    rowwise: Sequence[Tensor],
    shared: Sequence[Tensor | None],
    dtype: torch.dtype,
    rows: slice,
) -> Tensor:
    """Some rows of x."""
    return compute(*(t.reshape(-1, t.shape[-1])[rows] for t in rowwise), *shared).to(dtype)


def _factor_gradients(
    dY: Tensor,
    up: Tensor,
    XA: Tensor | None,
    mask: Tensor | None,
    needs_A: bool,
    input_rows: Callable[[slice], Tensor],
    d_in: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """G = dY·up, dA = Gᵀ·X̃ in float32 or better, dB = dYᵀ·XA, in one pass over dY and x.

    The shapes of the small products are those that are fast in BLAS: a narrow matrix comes first and
    transposed, (r, T)·(T, d); the other way around takes up to six times as long.
    """
    T, d_out = dY.shape
    G = dY.new_empty(T, up.shape[1])
    dA = dY.new_empty(up.shape[1], d_in) if needs_A else None
    dBt = dY.new_empty(up.shape[1], d_out) if XA is not None else None
    step = chunks(T, max(d_in, d_out), dY)
    for start in range(0, max(T, 1), step):
        rows = slice(start, start + step)
        torch.mm(dY[rows], up, out=G[rows])
        beta = min(start, 1)  # the first product overwrites what is there
        if dBt is not None:
            dBt.addmm_(XA[rows].t(), dY[rows], beta=beta)  # type: ignore[index]
        if dA is not None:
            X = input_rows(rows)
            X = X if mask is None else X * mask.view(T, d_in)[rows]
            dA.addmm_(G[rows].t(), X, beta=beta)
    wide = torch.promote_types(dY.dtype, torch.float32)
    return G, None if dA is None else dA.to(wide), None if dBt is None else dBt.t()


def _sum_of_products(one: Tensor, other: Tensor) -> Tensor:
    """(one∘other).sum(0), a few rows at a time."""
    step = chunks(len(one), one.shape[1], one)
    total = one.new_zeros(one.shape[1])
    for a, b in zip(one.split(step), other.split(step), strict=True):
        total += (a * b).sum(0)
    return total


def _input_gradient(
    dY: Tensor,
    G: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    factors: Tensor | None,
    scaling: float,
    mask: Tensor | None,
    merged: bool | None,
) -> Tensor:
    """dX, (T, d_in)."""
    if mask is None and _choose(merged, dY.shape[0], dY.shape[1], dY.dtype):
        weight = torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=scaling)
        return dY @ (weight if factors is None else weight.mul_(factors[:, None]))
    dX = dY @ (W if factors is None else W * factors[:, None])
    if mask is None:
        return dX.addmm_(G, A.to(W.dtype))
    step = chunks(len(dX), dX.shape[1], dX)
    for x, g, m in zip(dX.split(step), G.split(step), mask.view(dX.shape).split(step), strict=True):
        x.add_((g @ A.to(W.dtype)).mul_(m))
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
    return *(next(found) if need else None for need in needs), *[None] * 6
