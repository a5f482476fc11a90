"""Dropout's products with r columns, as kernels: the mask is made again, never saved. Imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from lora_lightning.kernels.fused.pieces import dot, dropped, narrow


@triton.jit
def low_rank_rows(
    x, seed, down, out, T, D, x_row, down_row, out_row, threshold, grown, COPIES: tl.constexpr,
    RANK: tl.constexpr, BESIDE: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (T, BESIDE) = dropped(x)·downᵀ, and zeros from RANK on; with COPIES behind x itself. A program
    takes BLOCK_T tokens.

    Args:
        x: (T, D), rows x_row apart.
        down: (RANK, D), rows down_row apart.
        out: rows out_row apart.
        R: BESIDE rounded up to a power of two.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    has_row = rows < T
    r = tl.arange(0, R)
    random = tl.load(seed)
    total = tl.zeros([BLOCK_T, R], tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        has_column = columns < D
        inside = has_row[:, None] & has_column[None, :]
        tile = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
        if COPIES:
            tl.store(out + rows[:, None] * out_row + columns[None, :], tile, mask=inside)
        tile = narrow(dropped(tile, rows, columns, random, threshold, grown), DTYPE)
        own = (r < RANK)[None, :] & has_column[:, None]
        a = narrow(tl.load(down + r[None, :] * down_row + columns[:, None], mask=own, other=0.0), DTYPE)
        total += dot(tile, a, PRECISION)
    beside = has_row[:, None] & (r < BESIDE)[None, :]
    if COPIES:
        out += D
    tl.store(out + rows[:, None] * out_row + r[None, :], narrow(total, DTYPE), mask=beside)


@triton.jit
def add_dropped(
    dX, seed, left, down, out, T, D, dx_row, left_row, down_row, threshold, grown,
    RANK: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (T, D), contiguous = dX + dropped(left·down). Program (column block, token block).

    Args:
        dX: (T, D), rows dx_row apart.
        left: (T, RANK), rows left_row apart.
        down: (RANK, D), rows down_row apart.
    """
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, R)
    has_row, has_column, has_rank = rows < T, columns < D, r < RANK
    low = has_row[:, None] & has_rank[None, :]
    g = narrow(tl.load(left + rows[:, None] * left_row + r[None, :], mask=low, other=0.0), DTYPE)
    own = has_rank[:, None] & has_column[None, :]
    a = narrow(tl.load(down + r[:, None] * down_row + columns[None, :], mask=own, other=0.0), DTYPE)
    change = dropped(dot(g, a, PRECISION), rows, columns, tl.load(seed), threshold, grown)
    inside = has_row[:, None] & has_column[None, :]
    sum_ = (
        tl.load(dX + rows[:, None] * dx_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        + change
    )
    tl.store(out + rows[:, None] * D + columns[None, :], narrow(sum_, DTYPE), mask=inside)
