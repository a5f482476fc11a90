"""What a compiler is given off the CPU: W' = W + s·B·A as a layer's weight, and gradients it can trace.

A compiler fuses what goes from entry to entry: a branch costs its passes over x and y all the same, W' hardly
more than its own size. Shapes: x is (..., d_in), seen as (T, d_in); W is (d_out, d_in); A is (r, d_in); B is
(d_out, r). The forms are

    y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ                                                       "plain"
    y = x·W'ᵀ + b,  dX = dY·W',  dW = dYᵀ·X,  dA = s·Bᵀ·dW,  dB = s·dW·Aᵀ            "dense", by autograd
    y = x·W'ᵀ + b,  [dX | G] = dY·[W' | s·B],  dA = Gᵀ·X,  dB = s·dYᵀ·(X·Aᵀ)         "extended"

With DoRA "dense" is taken, with W' = c∘(W + s·B·A). `python -m benchmarks.compiled` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import common
from lora_lightning.kernels.common import PLAIN, cast, without_autocast
from lora_lightning.kernels.dora import row_norms
from lora_lightning.kernels.half import shared_out, times
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.kernels.rounding import mixed
from lora_lightning.kernels.weights import update_of

# Of an H100, which reaches 2.6 TB/s, 650 TFLOP/s in half precision, 320 with TF32, which its convolutions
# take, and 50 without: bytes moved while a kernel begins (2.5 µs), and operations in the time of a byte.
LAUNCH, HALF, TF32, SINGLE = 6_500_000, 250, 120, 20
ALIGNED = 16  # columns of a product's right side
BEYOND = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32 that a dtype has no place for


def compiles(*tensors: Tensor | None) -> bool:
    """Whether a compiler reads the layer for a device that is no CPU."""
    return (
        torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not any(t is not None and common.on_cpu(t.device) for t in tensors)
        and {QuantizedTensor, *PLAIN}.issuperset(map(type, tensors))
    )


def linear_form(x: Tensor, d_out: int, dtype: torch.dtype, dora: bool) -> str:
    """The form of a linear layer; arguments as of `cheapest`."""
    d_in, forms = x.shape[-1], ("dense", "plain") if dora else ("extended", "dense", "plain")
    return cheapest(x.numel() // d_in, d_in, d_out, d_in * d_out, dtype, SINGLE, forms)


def conv_form(positions: int, weight: Tensor, channels: int, dtype: torch.dtype) -> str:
    """Of a convolution: "formed", conv(x, W'), or "reference", a branch. Arguments as of `cheapest`."""
    form = cheapest(positions, channels, len(weight), weight.numel(), dtype, TF32, ("dense", "plain"))
    return "formed" if form == "dense" else "reference"


def cheapest(
    tokens: int, d_in: int, d_out: int, size: int, dtype: torch.dtype, single: int, forms: Sequence[str]
) -> str:
    """Which of the forms takes a GPU the least time, counted in bytes that it could move meanwhile.

    A kernel takes `LAUNCH` at least, a product what its operations are worth. Of a number of tokens that the
    compiler does not know, any is taken for large enough: so code is not made anew for each.

    Args:
        tokens: T, of a convolution positions of its output.
        d_in, d_out: numbers of x and of y for each.
        size: of W.
        dtype: of the products.
        single: operations in the time of a byte in float32.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes sympy; here it is loaded

    item, half = dtype.itemsize, dtype.itemsize < 4
    merging = _kernels(4 * size, (4 + 2 * item) * size)  # B·A, and the sum
    # form -> what it takes beyond x·Wᵀ + b and dX: once, and for each token
    if torch.is_grad_enabled():
        dW = max(item * (d_in + d_out), 2 * size // (HALF if half else single))
        costs = {
            "extended": (merging + LAUNCH * (7 if half else 3), item * (2 * d_in + d_out)),
            "dense": (merging + _kernels(item * size, (4 + item) * size * half, 4 * size, 4 * size), dW),
            "plain": (LAUNCH * (11 if half else 7), 5 * item * (d_in + d_out)),
        }
    else:
        costs = {
            "extended": (merging, 0),
            "dense": (merging, 0),
            "plain": (LAUNCH * (5 if half else 3), item * (d_in + 3 * d_out)),
        }
    best, *others = sorted(forms, key=lambda form: costs[form][1])
    for form in others:
        (once, each), (best_once, best_each) = costs[form], costs[best]
        if statically_known_true(tokens * (each - best_each) < best_once - once):
            best = form
    return best


def _kernels(*moved: int) -> int:
    """What kernels take that move so many bytes each."""
    return sum(max(n, LAUNCH) for n in moved if n)


def linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    form: str,
) -> Tensor:
    """`linear_form.plain` without dropout by the form "dense" or "extended", in products of `dtype`."""
    with without_autocast(x.device.type):
        low, bias = cast(x, dtype), None if bias is None else cast(bias, dtype)
        if form == "dense":
            return F.linear(low, effective(W, A, B, magnitude, scaling, dtype), bias)
        W = cast(W, A.dtype) if type(W) is QuantizedTensor else W
        y: Tensor = ExtendedLinear.apply(low, W, bias, A, B, scaling)
        return y


def effective(
    W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, scaling: float, dtype: torch.dtype
) -> Tensor:
    """W + s·B·A, with DoRA its rows scaled to the magnitudes, in W's shape and `dtype`; also a convolution's,
    with factors as of `lora_conv`."""
    sums = cast(W, A.dtype) + scaling * update_of(W, A, B, 1.0)
    if magnitude is not None:
        c = magnitude / row_norms(sums.detach())  # held constant but for the magnitudes
        sums = sums * c.view(-1, *[1] * (W.dim() - 1))
    return dithered(sums, dtype) if W.dtype == dtype and dtype in BEYOND else cast(sums, dtype)


def dithered(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 in half precision as by `rounding.dithered_`, but with the noise made in the same pass, and
    with the gradient of a cast."""
    with torch.no_grad():
        noise = mixed(torch.arange(sums.numel(), device=sums.device).view(sums.shape)) >> 17
        lost = BEYOND[dtype]
        noise = (noise << 1 if lost == 16 else noise >> 2).to(torch.int32)
        bits = sums.detach().view(torch.int32).clamp(max=0x7FC00000)  # a NaN with all bits set would overflow
        rounded = ((bits + noise) & -(1 << lost)).view(torch.float32)
    return (sums + (rounded - sums).detach()).to(dtype)


class ExtendedLinear(torch.autograd.Function):
    """The form "extended". Compilers take no second derivative; this has none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        (rank, d_in), dtype = A.shape, x.dtype
        merged, up = effective(W, A, B, None, scaling, dtype), cast(B * scaling, dtype)
        empty = up.new_zeros(len(up), -(d_in + rank) % ALIGNED)
        extended = torch.cat([merged, up, empty], dim=1)  # (d_out, d_in + r and more)
        ctx.save_for_backward(x, extended, A, B)
        ctx.scaling = scaling
        return F.linear(x, extended[:, :d_in], bias)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, extended, A, B = ctx.saved_tensors
        (rank, d_in), scaling, dtype = A.shape, ctx.scaling, x.dtype
        dY2, x2 = dY.reshape(-1, dY.shape[-1]), x.reshape(-1, d_in)  # (T, d_out), (T, d_in)
        dX = dbias = None
        if ctx.needs_input_grad[0]:
            both = dY2 @ extended
            dX, G = both[:, :d_in].reshape(x.shape), both[:, d_in : d_in + rank]
        else:
            G = dY2 @ extended[:, d_in : d_in + rank]
        down, _, c = shared_out(A, B, scaling, dtype)
        dB = cast(dY2.t() @ (x2 @ cast(down, dtype).t()), B.dtype) * scaling
        dB = dB if c is None else times(dB, c)
        if ctx.needs_input_grad[2]:
            dbias = dY2.sum(0)
        return dX, None, dbias, cast(G.t() @ x2, A.dtype), dB, None
