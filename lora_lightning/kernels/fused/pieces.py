"""What the kernels are made of: rounding, products, random bits, and X from its source. Imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

# Of the interpreter (TRITON_INTERPRET=1), which has no assembly, rounds to bfloat16 by cutting off, and
# multiplies bfloat16 as the integers that it stores them in.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def nearest_bfloat16(x):
    """float32 to bfloat16 by its bits, ties to even; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF).to(tl.uint32)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in the products' dtype, to nearest."""
    if INTERPRETED and DTYPE == tl.bfloat16 and x.dtype == tl.float32:
        return nearest_bfloat16(x)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a·b, summed in float32. Products of half precision are exact in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def pinned(x, PIN: tl.constexpr):
    """x, computed once. A tile that goes into two products, which want it in two layouts, is else made in
    each: GELU of every element twice, rather than one exchange of the results."""
    if INTERPRETED or not PIN:
        return x
    elif x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=2)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=1)


@triton.jit
def mixed(x):
    """32 random bits of a number, uint32: lowbias32 of Chris Wellons' hash prospector."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropped(x, rows, columns, seed, threshold, scale):
    """x times scale, zero where dropout drops it: by random bits of row, column and seed."""
    row = mixed(rows.to(tl.uint32) ^ seed.to(tl.uint32))  # once a row and a column: the rest is an entry's
    column = mixed(
        columns.to(tl.uint32) + 0x9E3779B9
    )  # of other numbers than the rows', which are below 2^31
    bits = (row[:, None] ^ column[None, :]) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return tl.where((bits >> 1).to(tl.int32) >= threshold, x.to(tl.float32) * scale, 0.0)


@triton.jit
def gelu_of_half(x):
    """max(x, 0) - |x|·erfc(|x|/√2)/2 with Abramowitz and Stegun 7.1.28, erfc(a) = (1 + a₁a + … + a₆a⁶)^-16 to
    3e-7: one special function and no branch, for a result that is rounded to half precision."""
    a = tl.abs(x)
    p = 5.3829750e-6 * a + 4.8890636e-5
    p = ((p * a + 3.8003575e-5) * a + 3.2776264e-3) * a + 2.1141006e-2
    q = tl.rsqrt((p * a + 4.9867347e-2) * a + 1.0)
    q *= q
    q *= q
    q *= q
    q *= q
    q *= q
    return tl.maximum(x, 0.0) - 0.5 * a * q


@triton.jit
def made(u, mean, rstd, weight, bias, SOURCE: tl.constexpr, HALF: tl.constexpr):
    """A tile of X, float32, from its source's: u (tokens, columns), mean and rstd (tokens,), weight and bias
    (columns,)."""
    x = u.to(tl.float32)
    if SOURCE == "gelu":
        if HALF:
            x = gelu_of_half(x)
        else:
            x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif SOURCE == "gelu_tanh":  # 0.5·x·(1 + tanh k) = x·sigmoid(2k)
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif SOURCE == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif SOURCE == "relu":
        x = tl.maximum(x, 0.0)
    elif SOURCE == "layer_norm":
        x = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    elif SOURCE == "rms_norm":
        x = x * rstd[:, None] * weight[None, :]
    return x
