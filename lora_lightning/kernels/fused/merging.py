"""The merged weight and s·B beside it, E = [W + s·B·A | s·B | 0], as one Triton kernel. Imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from lora_lightning.kernels.fused.pieces import mixed, narrow


@triton.jit
def base_weight(W, scales, table, rows, columns, inside, d_in, w_row, KIND: tl.constexpr):
    """A tile of W, float32: of floats, of int8 codes with a scale a row, or of nf4 codes, two a byte, with a
    scale for 64 entries and a table of 16 numbers."""
    at = rows[:, None].to(tl.int64) * w_row + columns[None, :]
    if KIND == "nf4":
        entry = rows[:, None].to(tl.int64) * d_in + columns[None, :]
        byte = tl.load(W + entry // 2, mask=inside, other=0).to(tl.int32)
        code = (byte >> (4 - 4 * (entry % 2)).to(tl.int32)) & 15  # the first of the two in the upper bits
        scale = tl.load(scales + entry // 64, mask=inside, other=0.0)
        return tl.load(table + code) * scale
    elif KIND == "int8":
        scale = tl.load(scales + rows[:, None], mask=inside, other=0.0)
        return tl.load(W + at, mask=inside, other=0).to(tl.float32) * scale
    else:
        return tl.load(W + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def dithered(x, bits, DTYPE: tl.constexpr):
    """x, float32, in half precision: up or down in proportion to the distances, by the random bits given; x
    itself where it is one of the dtype's values."""
    own = x.to(tl.uint32, bitcast=True)
    finite = (own & 0x7F800000) != 0x7F800000
    if DTYPE == tl.bfloat16:
        cut = tl.where(x == x, own >> 16, 0x7FC0)
        moved = (own + ((bits >> 17) << 1)) >> 16  # 15 bits, as a table of int16 has them
        return tl.where(finite, moved, cut).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        noise = bits >> 19
        normal = ((own + noise) & 0xFFFFE000).to(tl.float32, bitcast=True)
        small = tl.floor(x * 16777216.0 + noise.to(tl.float32) * 0.0001220703125) * 5.9604644775390625e-08
        return tl.where(finite, tl.where(tl.abs(x) < 6.103515625e-05, small, normal), x).to(tl.float16)


@triton.jit
def merge_weight(
    W, scales, table, A, B, out, d_out, d_in, w_row, a_row, b_row, out_row, scaling,
    RANK: tl.constexpr, BESIDE: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, ADDS: tl.constexpr,
    DITHER: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[:, :d_in] = W (+ scaling·B·A), in float32; out[:, d_in:] = scaling·B, and zeros up to BESIDE.

    Program (column block, row block); the first of a row writes what is beside. R is BESIDE rounded up to a
    power of two. Random bits are of an entry's place alone: of no block size, no step.
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row = rows < d_out
    inside = has_row[:, None] & (columns < d_in)[None, :]
    update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ADDS:
        for k in tl.range(0, RANK, loop_unroll_factor=8):  # exact, with neither tensor cores nor padding
            b = tl.load(B + rows * b_row + k, mask=has_row, other=0.0).to(tl.float32)
            a = tl.load(A + k * a_row + columns, mask=columns < d_in, other=0.0).to(tl.float32)
            update += b[:, None] * a[None, :]
    merged = base_weight(W, scales, table, rows, columns, inside, d_in, w_row, KIND) + scaling * update
    if DITHER:
        place = rows[:, None].to(tl.uint32) * d_in + columns[None, :].to(tl.uint32)
        low = dithered(merged, mixed(place), DTYPE)
    else:
        low = narrow(merged, DTYPE)
    line = out + rows[:, None].to(tl.int64) * out_row
    tl.store(line + columns[None, :], low, mask=inside)
    if tl.program_id(0) == 0:
        r = tl.arange(0, R)
        own = has_row[:, None] & (r < RANK)[None, :]
        b = tl.load(B + rows[:, None] * b_row + r[None, :], mask=own, other=0.0).to(tl.float32) * scaling
        tl.store(line + d_in + r[None, :], narrow(b, DTYPE), mask=has_row[:, None] & (r < BESIDE)[None, :])
