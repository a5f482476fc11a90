"""The gradient of DoRA's magnitudes, (dY∘(y - b)).sum(0) / m, as two Triton kernels. Imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column_dots(
    dY, y, bias, out, T, D, dY_row, y_row, span,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[split] = (dY∘(y - bias)).sum(0), over a span of tokens and BLOCK_D columns, in float32.

    Program (column block, split). dY and y are (T, D), their rows dY_row and y_row apart; bias is (D,); out
    is (splits, D).
    """
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    tokens = tl.arange(0, BLOCK_T)
    first = split.to(tl.int64) * span
    count = tl.minimum(T - split * span, span)
    dY_tile = dY + first * dY_row + tokens[:, None] * dY_row + columns[None, :]
    y_tile = y + first * y_row + tokens[:, None] * y_row + columns[None, :]
    b = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for done in range(0, count, BLOCK_T):
        inside = (tokens < count - done)[:, None] & (columns < D)[None, :]
        own = tl.load(y_tile, mask=inside, other=0.0).to(tl.float32) - b[None, :]
        total += tl.load(dY_tile, mask=inside, other=0.0).to(tl.float32) * own
        dY_tile += BLOCK_T * dY_row
        y_tile += BLOCK_T * y_row
    tl.store(out + split.to(tl.int64) * D + columns, tl.sum(total, axis=0), mask=columns < D)


@triton.jit
def divided_sum(parts, magnitude, out, D, splits, BLOCK: tl.constexpr, DEEP: tl.constexpr):
    """out = parts.sum(0) / magnitude in a fixed order, 0 where the magnitude is 0. parts is (splits, D)."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, DEEP)
    total = tl.zeros([DEEP, BLOCK], tl.float32)
    for first in range(0, splits, DEEP):
        inside = (rows < splits - first)[:, None] & (columns < D)[None, :]
        total += tl.load(parts + (rows + first)[:, None] * D + columns[None, :], mask=inside, other=0.0)
    m = tl.load(magnitude + columns, mask=columns < D, other=1.0).to(tl.float32)
    quotient = tl.where(m == 0, 0.0, tl.sum(total, axis=0) / tl.where(m == 0, 1.0, m))
    tl.store(out + columns, quotient, mask=columns < D)
