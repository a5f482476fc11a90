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

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.common import (
    cast,
    chunks,
    magnitude_gradient,
    pieces,
    product_dtype,
    row_norms,
    without_autocast,
)
from lora_lightning.kernels.dropout import masked
from lora_lightning.kernels.factors import factor_gradients, low_rank
from lora_lightning.kernels.half import shared_out, times
from lora_lightning.kernels.sources import RecomputeSource

MERGE_FROM = 2  # fresh memory for W' costs about as much again as the sum


def merges(touched: int, size: int, dtype: torch.dtype) -> bool:
    """Whether to form W + s·B·A, of `size` = d_in·d_out numbers, rather than to add a branch.

    Args:
        touched: numbers that a branch would touch: T·d_in in the backward, where dX begins with it; in the
            forward see `_touched`.
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
    down, up, _ = shared_out(A, B, scaling, product_dtype(x))
    y = F.linear(x, W, bias)
    branch = F.linear(F.linear(dropped, cast(down, x.dtype)), cast(up, x.dtype))
    if magnitude is None:
        return y + branch
    with torch.no_grad(), without_autocast(x.device.type):
        norms = row_norms(cast(W, A.dtype) + scaling * B @ A)
    # c·(x·Wᵀ + branch) - x·Wᵀ, with c = 1 exactly at the start
    c = magnitude / norms
    product = y if bias is None else y - bias.to(y.dtype)
    return y + ((c - 1).to(y.dtype) * product + c.to(y.dtype) * branch)


class LinearSpec(NamedTuple):
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
        spec: LinearSpec,
        source: RecomputeSource,
    ) -> Tensor:
        """Args beyond those of `plain`:
        mask: bool, of x's shape, true where an entry of x is kept; None without dropout.
        source: where the backward gets x from.
        """
        with without_autocast(x.device.type):
            y, low, H, factors, divided = forward(x, W, bias, A, B, magnitude, mask, spec)
        if source.is_input:
            source = replace(source, rowwise=(low,))
        ctx.spec = spec
        ctx.compute, ctx.rowwise = source.compute, len(source.rowwise)
        # DoRA needs y, which the next operation often saves too. Saved as an output it could not be
        # changed in place, as ReLU(inplace=True) does: it is saved as data and watched here.
        ctx.watched = None if magnitude is None else (y.detach(), y._version)
        ctx.save_for_backward(
            W, bias, A, B, magnitude, factors, H, divided, mask,
            None if magnitude is None else y.data, *source.rowwise, *source.shared,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        W, bias, A, B, magnitude, factors, H, divided, mask, y, *kept = ctx.saved_tensors
        scaling, keep, merged, dtype = ctx.spec
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
            up = (B if factors is None else B * factors[:, None]).t()
            made_from = RecomputeSource(rowwise, shared, ctx.compute)
            merge = mask is None and _choose(merged, dY2.shape[0] * W.shape[1], W.numel(), dY.dtype)
            G, dA, dB = factor_gradients(
                dY2,
                cast(up, dtype).contiguous(),
                cast(A, dtype),
                H,
                mask,
                made_from,
                scaling / keep,
                (needs_x and not merge, needs_A, needs_B),
            )
            if dA is not None:
                dA = cast(dA, A.dtype)
            if dB is not None:
                dB = times(cast(dB, B.dtype) if factors is None else dB * factors[:, None], divided)
            if needs_bias or needs_m:
                dbias = dY2.sum(0)
            if needs_m:
                if ctx.watched is None or ctx.watched[0]._version != ctx.watched[1]:
                    x = ctx.compute(*rowwise, *shared, None)
                    y = forward(x, W, bias, A, B, magnitude, mask, ctx.spec)[0]
                dm = _sum_of_products(dY2, y.view(dY2.shape))
                dm = magnitude_gradient(dm if bias is None else dm.sub_(dbias * bias), magnitude)
            if needs_x:
                dX = _input_gradient(dY2, G, cast(W, dtype), A, B, factors, mask, ctx.spec)
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
    scaling, keep, merged, dtype = spec
    low, factors, H, divided = cast(x, dtype), None, None, None
    tokens = low.reshape(-1, W.shape[1])  # (T, d_in)
    starts = _starts(low)
    touched = _touched(tokens, W, len(A), starts and bias is not None)
    merge = mask is None and (magnitude is not None or _choose(merged, touched, W.numel(), dtype))
    weight, bias = cast(W, dtype), None if bias is None else cast(bias, dtype)
    if merge or magnitude is not None:
        weight, factors = _effective(weight, A, B, magnitude, scaling, merge)
    if merge:
        y = F.linear(low, weight, bias).contiguous()
    else:
        up = B if factors is None else B * factors[:, None]
        down, up, divided = shared_out(A, up, scaling / keep, dtype)
        H, up = low_rank(cast(down, dtype), tokens, mask), cast(up, dtype)
        if starts:
            y = _branch(H, up, bias).addmm_(tokens, weight.t()).view(*low.shape[:-1], W.shape[0])
        else:
            y = F.linear(low, weight, bias).contiguous()
            y.view(-1, W.shape[0]).addmm_(H.t(), up.t())
    # autograd lets nobody change a view from a function in place
    y = torch.ops.aten._unsafe_view.default(y, y.shape)
    return y, low, H, factors, divided


def _starts(x: Tensor) -> bool:
    """Whether y may begin with the branch, onto which x·Wᵀ is then added: where this gives the bits of
    `F.linear` for a branch of zeros, which on a CPU begins with b and adds x·Wᵀ to that."""
    return x.device.type == "cpu" and x.element_size() >= 4 and (x.dim() == 2 or x.is_contiguous())


def _touched(x: Tensor, W: Tensor, rank: int, begins: bool) -> int:
    """Numbers that a branch reads or writes beyond what `F.linear` does: x and y, or x alone where it takes
    the place of writing b. Above rank 16 its arithmetic takes longer than that."""
    return len(x) * (W.shape[1] if begins and rank <= 16 else sum(W.shape))


def _branch(H: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """(up·H)ᵀ + b as one product, with ones under H and b beside up: writing b alone takes as long."""
    if bias is not None:
        H, up = torch.cat([H, H.new_ones(1, H.shape[1])]), torch.cat([up, bias[:, None]], dim=1)
    return H.t() @ up.t()


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
    W: Tensor,
    A: Tensor,
    B: Tensor,
    factors: Tensor | None,
    mask: Tensor | None,
    spec: LinearSpec,
) -> Tensor:
    """dX, (T, d_in): by the sum of W and its update where there is no G, else by each. The small product
    comes first and the large one is added onto it: the other order reads and writes dX once more."""
    scaling, keep, _, _ = spec
    if G is None:
        weight = torch.addmm(W, cast(B, W.dtype), cast(A, W.dtype), alpha=scaling)
        return dY @ (weight if factors is None else weight.mul_(factors[:, None]))
    down = cast(A, W.dtype) * (scaling / keep)
    if mask is None:
        dX = G.t() @ down
    else:
        dX = dY.new_empty(mask.numel() // W.shape[1], W.shape[1])
        sizes, _ = chunks(len(dX), dX.shape[1], dX)
        for x, g, m in zip(*(pieces(t, sizes) for t in (dX, G.t(), mask.view(dX.shape))), strict=True):
            masked(g @ down, m, out=x)
    return dX.addmm_(dY, W if factors is None else W * factors[:, None])


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
