"""The products with r columns that a linear layer's factors take, in one pass over the activations.

They are bound by memory and by how BLAS packs them, so that everything here is about order and layout. A
pass takes a piece of rows at a time, which stays in the cache from one product to the next. With several
threads a piece is cut into as many parts, and one batched product gives each thread a part of its own: a
product with 8 columns is too narrow for BLAS to share out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.kernels import cast, chunks, masked, pieces
from lora_lightning.kernels.sources import Source

NARROW = (
    16  # floats in a vector register: MKL's products with fewer rows go another way than with fewer columns
)


def low_rank(x: Tensor, mask: Tensor | None, A: Tensor) -> Tensor:
    """X̃·Aᵀ, (T, r), for x (T, d) with the entries where the mask is false dropped."""
    sizes, threads = chunks(len(x), x.shape[1], x)
    masks = None if mask is None else pieces(mask.view(x.shape), sizes)
    parts = []
    for i, rows in enumerate(pieces(x, sizes)):
        kept = rows if masks is None else masked(rows, masks[i])
        parts.append(_narrow(_shared(kept, threads), A).flatten(0, -2))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def factor_gradients(
    dY: Tensor,
    up: Tensor,
    A: Tensor,
    XA: Tensor | None,
    mask: Tensor | None,
    source: Source,
    alpha: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """G = dY·upᵀ, dA = α·Gᵀ·X̃ and dB = α·dYᵀ·XA with XA = X̃·Aᵀ, in one pass over dY and x.

    Both narrow products come before both sums: they read what is not in the cache yet in fewer steps.

    Args:
        dY: (T, d_out).
        up: (r, d_out).
        A: (r, d_in).
        XA: (T, r), if there is one already.
        needs: which of G (T, r), dA (r, d_in) and dB (d_out, r) are wanted.
    """
    (T, d_out), (r, d_in) = dY.shape, A.shape
    sizes, threads = chunks(T, max(d_in, d_out), dY)
    reads_x = needs[1] or (needs[2] and XA is None)
    parts = [pieces(t.reshape(-1, t.shape[-1]), sizes) for t in source.rowwise]
    masks = None if mask is None else pieces(mask.view(T, d_in), sizes)
    low = None if XA is None else pieces(XA, sizes)
    buffer = dY.new_empty(max(sizes), d_in) if reads_x and not source.is_input else None
    G, dA, dBt = [], _zeros(dY, threads, r, d_in), _zeros(dY, threads, r, d_out)
    for i, rows in enumerate(pieces(dY, sizes)):
        dy = _shared(rows, threads)
        if reads_x:
            made = None if buffer is None else buffer[: len(rows)]
            X = cast(source.compute(*(part[i] for part in parts), *source.shared, made), dY.dtype)
            X = _shared(X if masks is None else masked(X, masks[i]), threads)
        if needs[0] or needs[1]:
            g = _narrow(dy, up)
            G += [g.flatten(0, -2)] if needs[0] else []
        if needs[2]:
            xa = _narrow(X, A) if low is None else _shared(low[i], threads)
            _accumulate(dBt, xa, dy, alpha)
        if needs[1]:
            _accumulate(dA, g, X, alpha)
    return (
        torch.cat(G) if needs[0] else None,
        _total(dA) if needs[1] else None,
        _total(dBt).t() if needs[2] else None,
    )


def _shared(rows: Tensor, threads: int) -> Tensor:
    """(n, d) as (threads, n / threads, d) where that comes out even, for a batched product; else as it is."""
    n, d = rows.shape
    return rows if threads == 1 or n % threads else rows.reshape(threads, n // threads, d)


def _narrow(x: Tensor, factor: Tensor) -> Tensor:
    """x·factorᵀ for a factor of r rows: (..., n, d) -> (..., n, r)."""
    multiply, factor = (torch.mm, factor) if x.dim() == 2 else (torch.bmm, factor.expand(len(x), -1, -1))
    if x.device.type == "cpu" and factor.shape[-2] < NARROW:
        return multiply(factor, x.mT).mT  # half the time
    return multiply(x, factor.mT)


def _zeros(like: Tensor, threads: int, *shape: int) -> Tensor:
    """A sum for each thread."""
    return like.new_zeros(shape if threads == 1 else (threads, *shape))


def _accumulate(sum_: Tensor, low: Tensor, x: Tensor, alpha: float) -> None:
    """sum_ += α·lowᵀ·x, (r, n)·(n, d): the narrow matrix first takes as little as a sixth of xᵀ·low."""
    if x.dim() == 2:
        (sum_ if sum_.dim() == 2 else sum_[0]).addmm_(low.t(), x, alpha=alpha)
    else:
        sum_.baddbmm_(low.mT, x, alpha=alpha)


def _total(sum_: Tensor) -> Tensor:
    return sum_ if sum_.dim() == 2 else sum_.sum(0)
