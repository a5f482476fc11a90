"""The factors' gradients in two passes over memory and a sum, as Triton kernels. Imports Triton.

T tokens; X (T, d_in); dY (T, d_out); A (r, d_in); B (d_out, r); G = s·dY·B (T, r). Wanted, in float32,

    H = X·Aᵀ (T, r),   dA = Gᵀ·X (r, d_in),   dB = s·dYᵀ·H (d_out, r).

dA needs no H and H needs no G: a tile of X, once made from its source, yields both. So

    over the source of X:   dA's columns of the tile, and what they add to H, a part for each column block
    over dY:                the parts summed up, then dB's rows of the tile
    over the splits:        the sums of what the splits of the tokens gave, in a fixed order

X's source and dY are read once each, and GELU or the norm is computed once an element. Nothing is added
atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_lightning.kernels.fused.pieces import dot, dropped, made, narrow, pinned


@triton.jit
def factor_pass(
    u, mean, rstd, weight, bias, seed, down, left, parts, out,
    T, D, u_row, left_row, left_part, down_row, out_split, out_column, out_rank, span, scale,
    threshold, grown,
    RANK: tl.constexpr, R: tl.constexpr, SOURCE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPS: tl.constexpr,
    DOWN: tl.constexpr, LEFT_PARTS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIN: tl.constexpr,
):  # fmt: skip
    """out[split] = scale·Xᵀ·left over a span of tokens and BLOCK_D columns; with DOWN also parts[column
    block] = X·downᵀ.

    Program (column block, split): neighbours work at the same tokens.

    Args:
        u: (T, D), rows u_row apart; mean, rstd: (T,) float32; weight, bias: (D,).
        seed, threshold, grown: of `dropped`, with DROPS.
        down: (RANK, D), rows down_row apart.
        left: (LEFT_PARTS, T, RANK), summed over its first axis; with DOWN one part, with rows left_row apart.
        parts: (column blocks, T, RANK) float32, contiguous.
        out: (splits, …) float32 at split·out_split + column·out_column + rank·out_rank.
        R: RANK rounded up to a power of two from 16 on.
    """
    column_block, split = tl.program_id(0), tl.program_id(1)
    columns = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    has_column = columns < D
    r = tl.arange(0, R)
    has_rank = r < RANK
    tokens = tl.arange(0, BLOCK_T)
    first = split.to(tl.int64) * span
    count = tl.minimum(T - split * span, span)
    u_tile = u + first * u_row + tokens[:, None] * u_row + columns[None, :]
    if not DOWN:
        left_row = RANK  # a constant: a launcher tells the compiler of multiples of 16 alone
    left_tile = left + first * left_row + tokens[:, None] * left_row + r[None, :]
    w = tl.full([BLOCK_D], 1.0, tl.float32)
    b = tl.zeros([BLOCK_D], tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + columns, mask=has_column, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=has_column, other=0.0).to(tl.float32)
    if SOURCE == "layer_norm":
        mean += first
    if SOURCE == "layer_norm" or SOURCE == "rms_norm":
        rstd += first
    if DOWN:
        inside = has_rank[None, :] & has_column[:, None]
        a = narrow(tl.load(down + r[None, :] * down_row + columns[:, None], mask=inside, other=0.0), DTYPE)
        parts_tile = (
            parts + (column_block.to(tl.int64) * T + first) * RANK + tokens[:, None] * RANK + r[None, :]
        )
    total = tl.zeros([BLOCK_D, R], tl.float32)  # columns first: the other product with x shares its layout
    for done in range(0, count, BLOCK_T):
        here = tokens < count - done
        low = here[:, None] & has_rank[None, :]
        if LEFT_PARTS == 1:
            g = tl.load(left_tile, mask=low, other=0.0)
        else:
            g = tl.zeros([BLOCK_T, R], tl.float32)
            for part in tl.static_range(LEFT_PARTS):
                g += tl.load(left_tile + part * left_part, mask=low, other=0.0)
        g = narrow(g, DTYPE)
        m = tl.zeros([BLOCK_T], tl.float32)
        d = tl.zeros([BLOCK_T], tl.float32)
        if SOURCE == "layer_norm":
            m = tl.load(mean + tokens, mask=here, other=0.0)
            mean += BLOCK_T
        if SOURCE == "layer_norm" or SOURCE == "rms_norm":
            d = tl.load(rstd + tokens, mask=here, other=0.0)
            rstd += BLOCK_T
        x = tl.load(u_tile, mask=here[:, None] & has_column[None, :], other=0.0)
        if SOURCE != "identity":
            x = made(x, m, d, w, b, SOURCE, HALF=DTYPE != tl.float32)
        if DROPS:
            x = dropped(x, first + done + tokens, columns, tl.load(seed), threshold, grown)
        x = narrow(x, DTYPE)
        if SOURCE != "identity" or DROPS:
            x = pinned(x, PIN)
        total += dot(tl.trans(x), g, PRECISION)
        if DOWN:
            tl.store(parts_tile, dot(x, a, PRECISION), mask=low)
            parts_tile += BLOCK_T * RANK
        u_tile += BLOCK_T * u_row
        left_tile += BLOCK_T * left_row
    at = out + split.to(tl.int64) * out_split + columns[:, None] * out_column + r[None, :] * out_rank
    tl.store(at, total * scale, mask=has_column[:, None] & has_rank[None, :])


@triton.jit
def split_sum(
    one, other, out_one, out_other, n_one, n_other, splits_one, splits_other,
    BLOCK: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """The sums of one (splits_one, n_one) and of other (splits_other, n_other) over their first axes, in a
    fixed order."""
    blocks_one = tl.cdiv(n_one, BLOCK)
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    source, out, n, splits = one, out_one, n_one, splits_one
    if block >= blocks_one:
        at = (block - blocks_one) * BLOCK + tl.arange(0, BLOCK)
        source, out, n, splits = other, out_other, n_other, splits_other
    rows = tl.arange(0, DEEP)
    total = tl.zeros([DEEP, BLOCK], tl.float32)
    for first in range(0, splits, DEEP):
        inside = (rows < splits - first)[:, None] & (at < n)[None, :]
        total += tl.load(
            source + (rows + first)[:, None].to(tl.int64) * n + at[None, :], mask=inside, other=0.0
        )
    tl.store(out + at, tl.sum(total, axis=0), mask=at < n)
