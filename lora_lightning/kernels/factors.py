"""The products with r columns that a linear layer's factors take, in one pass over the activations.

They are bound by memory and by how BLAS packs them, so that everything here is about order and layout. A
pass takes a piece of the tokens at a time, which stays in the cache from one product to the next. With
several threads a piece is cut into as many parts, and one batched product gives each thread a part of its
own: a product with 8 columns is too narrow for BLAS to share out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.kernels.common import cast, chunks, pieces
from lora_lightning.kernels.dropout import masked
from lora_lightning.kernels.sources import RecomputeSource


def low_rank(A: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """A·X̃ᵀ, (r, T), for A (r, d) and x (T, d) with the entries where the mask is false dropped."""
    sizes, threads = chunks(len(x), x.shape[1], x)
    masks = None if mask is None else pieces(mask.view(x.shape), sizes)
    rows_first, found = _rows_first(A), []
    for i, tokens in enumerate(pieces(x, sizes)):
        kept = tokens if masks is None else masked(tokens, masks[i])
        found.append(_joined(_narrow(A, _shared(kept, threads), rows_first)))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def factor_gradients(
    dY: Tensor,
    up: Tensor,
    A: Tensor,
    H: Tensor | None,
    mask: Tensor | None,
    source: RecomputeSource,
    alpha: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """G = up·dYᵀ, dA = α·G·X̃ and dB = α·(H·dY)ᵀ with H = A·X̃ᵀ, in one pass over dY and x.

    Args:
        dY: (T, d_out).
        up: (r, d_out).
        A: (r, d_in).
        H: (r, T), if there is one already.
        needs: which of G (r, T), dA (r, d_in) and dB (d_out, r) are wanted.
    """
    (T, d_out), (r, d_in) = dY.shape, A.shape
    sizes, threads = chunks(T, max(d_in, d_out), dY)
    needs_G, needs_A, needs_B = needs
    reads_x = needs_A or (needs_B and H is None)
    sources = [pieces(t.reshape(-1, t.shape[-1]), sizes) for t in source.rowwise]
    masks = None if mask is None else pieces(mask.view(T, d_in), sizes)
    known = None if H is None else pieces(H, sizes, dim=1)
    buffer = dY.new_empty(max(sizes), d_in) if reads_x and not source.is_input else None
    rows_first, G = _rows_first(A), []
    dA, dBt = (dY.new_zeros(*([threads] if threads > 1 else []), r, d) for d in (d_in, d_out))
    for i, tokens in enumerate(pieces(dY, sizes)):
        dy = _shared(tokens, threads)
        if reads_x:
            made = buffer if buffer is None or len(tokens) == len(buffer) else buffer[: len(tokens)]
            X = cast(source.compute(*[part[i] for part in sources], *source.shared, made), dY.dtype)
            X = _shared(X if masks is None else masked(X, masks[i]), threads)
        # G and H before dA and dB: they read what is not in the cache yet in fewer steps
        if needs_G or needs_A:
            g = _narrow(up, dy, rows_first)
            if needs_G:
                G.append(_joined(g))
        if needs_B:
            h = _narrow(A, X, rows_first) if known is None else _parted(known[i], dy)
            _accumulate(dBt, h, dy, alpha)
        if needs_A:
            _accumulate(dA, g, X, alpha)
    return (
        torch.cat(G, dim=1) if needs_G else None,
        _total(dA) if needs_A else None,
        _total(dBt).t() if needs_B else None,
    )


def _shared(tokens: Tensor, threads: int) -> Tensor:
    """(n, d) as (threads, n / threads, d) where that comes out even, for a batched product; else as it is."""
    if threads == 1 or len(tokens) % threads:
        return tokens
    return tokens.reshape(threads, len(tokens) // threads, -1)


def _joined(low: Tensor) -> Tensor:
    """(r, n) of (threads, r, n / threads) or of itself."""
    return low if low.dim() == 2 else low.transpose(0, 1).flatten(1)


def _parted(low: Tensor, like: Tensor) -> Tensor:
    """`_joined` undone, where `like` is shared out."""
    return low if like.dim() == 2 else low.view(len(low), *like.shape[:2]).transpose(0, 1)


def _rows_first(factor: Tensor) -> bool:
    """Whether BLAS is faster at factor·xᵀ than at x·factorᵀ: MKL takes half the time up to 15 rows, and twice
    from 16."""
    return factor.device.type == "cpu" and len(factor) < 16


def _narrow(factor: Tensor, x: Tensor, rows_first: bool) -> Tensor:
    """factor·xᵀ of few rows: (r, d) and (..., n, d) -> (..., r, n)."""
    if x.dim() == 2:
        return torch.mm(factor, x.t()) if rows_first else torch.mm(x, factor.t()).t()
    factor = factor.expand(len(x), -1, -1)
    return torch.bmm(factor, x.mT) if rows_first else torch.bmm(x, factor.mT).mT


def _accumulate(sum_: Tensor, low: Tensor, x: Tensor, alpha: float) -> None:
    """sum_ += α·low·x, (r, n)·(n, d): a sixth of the time of (xᵀ·lowᵀ)ᵀ."""
    if x.dim() == 3:
        sum_.baddbmm_(low, x, alpha=alpha)
    else:
        (sum_ if sum_.dim() == 2 else sum_[0]).addmm_(low, x, alpha=alpha)


def _total(sum_: Tensor) -> Tensor:
    return sum_ if sum_.dim() == 2 else sum_.sum(0)
