"""The products with r columns that a linear layer's factors take, in one pass over the activations.

They are bound by memory and by how BLAS packs them, so that everything here is about order and layout. A
pass takes a piece of the tokens at a time, which stays in the cache from one product to the next. With
several threads a piece is cut into as many parts, and one batched product gives each thread a part of its
own: a product with 8 columns is too narrow for BLAS to share out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_lightning.kernels import common
from lora_lightning.kernels.common import cast, chunks
from lora_lightning.kernels.dropout import masked
from lora_lightning.kernels.sources import RecomputeSource


def low_rank(A: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """A·X̃ᵀ, (r, T), for A (r, d) and x (T, d) with the entries where the mask is false dropped."""
    if mask is None and x.nbytes <= common.CACHED:
        return _narrow(A, x)
    sizes, threads = chunks(x.shape[0], x.shape[1], x)
    parts = (_joined(_narrow(A, _shared(X, threads))) for X in _inputs(x, mask, sizes, x))
    return torch.cat([*parts], dim=1)


def factor_gradients(
    dY: Tensor,
    up: Tensor,
    A: Tensor,
    H: Tensor | None,
    mask: Tensor | None,
    x: Tensor | RecomputeSource,
    alpha: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """G = up·dYᵀ, dA = α·G·X̃ and dB = α·(H·dY)ᵀ with H = A·X̃ᵀ, in one pass over dY and x.

    Args:
        dY: (T, d_out).
        up: (r, d_out).
        A: (r, d_in).
        H: (r, T), if there is one already.
        x: (..., d_in), of T tokens.
        needs: which of G (r, T), dA (r, d_in) and dB (d_out, r) are wanted.
    """
    (T, d_out), (r, d_in) = dY.shape, A.shape
    sizes, threads = chunks(T, max(d_in, d_out), dY)
    needs_G, needs_A, needs_B = needs
    reads_x = needs_A or (needs_B and H is None)
    inputs = _inputs(x, mask, sizes, dY)
    known = None if H is None else torch.split_with_sizes(H, sizes, 1)
    split = (threads,) if threads > 1 else ()
    dA, dBt, G = dY.new_zeros(*split, r, d_in), dY.new_zeros(*split, r, d_out), []
    for i, tokens in enumerate(torch.split_with_sizes(dY, sizes)):
        dy = tokens if threads == 1 else _shared(tokens, threads)
        if reads_x:
            X = next(inputs) if threads == 1 else _shared(next(inputs), threads)
        # G and H before dA and dB: they read what is not in the cache yet in fewer steps
        if needs_G or needs_A:
            g = _narrow(up, dy)
            if needs_G:
                G.append(g if threads == 1 else _joined(g))
        if needs_B:
            h = _narrow(A, X) if known is None else known[i] if threads == 1 else _parted(known[i], dy)
            _accumulate(dBt, h, dy, alpha)
        if needs_A:
            _accumulate(dA, g, X, alpha)
    if threads > 1:
        dA, dBt = dA.sum(0), dBt.sum(0)
    return (
        torch.cat(G, dim=1) if needs_G else None,
        dA if needs_A else None,
        dBt.t() if needs_B else None,
    )


def _inputs(
    x: Tensor | RecomputeSource, mask: Tensor | None, sizes: list[int], like: Tensor
) -> Iterator[Tensor]:
    """X̃ in pieces of so many tokens, in the dtype of `like`; into one buffer where x is made again."""
    kept = (x,) if isinstance(x, Tensor) else x.rowwise
    parts = [torch.split_with_sizes(t.reshape(-1, t.shape[-1]), sizes) for t in kept]
    masks = None if mask is None else torch.split_with_sizes(mask.view(-1, mask.shape[-1]), sizes)
    buffer = None
    for i, size in enumerate(sizes):
        X = parts[0][i]
        if not isinstance(x, Tensor):
            if buffer is None:
                buffer = like.new_empty(max(sizes), X.shape[1])
            X = cast(x.compute(*[part[i] for part in parts], *x.shared, buffer[:size]), like.dtype)
        yield X if masks is None else masked(X, masks[i])


def _shared(tokens: Tensor, threads: int) -> Tensor:
    """(n, d) as (threads, n / threads, d) where that comes out even, for a batched product; else as it is."""
    if threads == 1 or tokens.shape[0] % threads:
        return tokens
    return tokens.reshape(threads, tokens.shape[0] // threads, -1)


def _joined(low: Tensor) -> Tensor:
    """(r, n) of (threads, r, n / threads) or of itself."""
    return low if low.dim() == 2 else low.transpose(0, 1).flatten(1)


def _parted(low: Tensor, like: Tensor) -> Tensor:
    """`_joined` undone, where `like` is shared out."""
    return low if like.dim() == 2 else low.view(low.shape[0], *like.shape[:2]).transpose(0, 1)


def _narrow(factor: Tensor, x: Tensor) -> Tensor:
    """factor·xᵀ of few rows: (r, d) and (..., n, d) -> (..., r, n). MKL takes half the time for it up to 15
    rows, and twice from 16."""
    rows_first = factor.device.type == "cpu" and factor.shape[0] < 16
    if x.dim() == 2:
        return torch.mm(factor, x.t()) if rows_first else torch.mm(x, factor.t()).t()
    factor = factor.expand(x.shape[0], -1, -1)
    return torch.bmm(factor, x.mT) if rows_first else torch.bmm(x, factor.mT).mT


def _accumulate(sum_: Tensor, low: Tensor, x: Tensor, alpha: float) -> None:
    """sum_ += α·low·x, (r, n)·(n, d): a sixth of the time of (xᵀ·lowᵀ)ᵀ."""
    if x.dim() == 3:
        sum_.baddbmm_(low, x, alpha=alpha)
    else:
        (sum_ if sum_.dim() == 2 else sum_[0]).addmm_(low, x, alpha=alpha)
