"""Which form a convolution with a low-rank update takes: by what its tensors are, and by their shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_lightning.kernels import compiled, sources
from lora_lightning.kernels.common import is_plain
from lora_lightning.kernels.linear_form import DENSE

SMALL = 2**19  # numbers in x and y together, up to which plain operations are the fastest: docs/speed.md
CALL = 2**23  # bytes that a GPU moves in the 3 µs of a call
TILE = 64  # rows that tensor cores multiply at once; fewer take as long


def choose_form(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    stride: Sequence[int],
    groups: int,
    dropout: float,
    dtype: torch.dtype,
    implementation: str,
    cpu: bool = True,
) -> str:
    """A key of `conv.FORMS`.

    On a CPU, with T positions (batch times output) and N numbers in W, the factored gradients take
    4·T·r·(columns + out) operations a group, the dense one 2·T·columns·out. Merging, twice a step, moves 4·N
    numbers; the branch 2·T·(in + out), for it adds to the output and to dX. Half precision takes the
    branch there.

    Elsewhere W' = W + s·B·A is always the weight, but with a dropout, which needs a branch: a W' is nearly
    free beside its activations. `dense_pays` says where the gradients of A and B come from.

    Args:
        dtype: of the products.
        cpu: whether the rules of a CPU hold.
    """
    if implementation == "reference" or weight.requires_grad or not x.numel():
        return "reference"
    positions = x.shape[0]
    for size, step in zip(x.shape[2:], stride, strict=True):
        positions *= size // step
    if not is_plain(x, weight, bias, A, B, magnitude):
        if dropout or not compiled.compiles(x, weight, bias, A, B, magnitude):
            return "reference"
        return compiled.conv_form(positions, weight, x.shape[1], dtype)
    dora, across = magnitude is not None, A.shape[0] != groups * B.shape[1]
    if not cpu:
        if dropout:
            return "reference" if dora or across else "dropped"
        if dora or across or dense_pays(positions, x.numel(), weight, groups, B.shape[1], dtype):
            return "dense"
        return "merged"
    moved, size = positions * (x.shape[1] + weight.shape[0]), weight.numel()
    branches = dtype.itemsize < 4 or dropout > 0
    differentiates = torch.is_grad_enabled()
    again = differentiates and x.nbytes >= sources.LEAST  # such an input may not have to be kept
    small = moved < SMALL and not again
    if small and implementation == "auto" and not dora:
        fits = size <= DENSE or (2 * moved >= size and not differentiates)
        return "summed" if fits and not branches else "reference"
    rank = B.shape[1]
    if dora or across:
        if branches:
            return "reference"
        if across:
            return "dense"
    rows = weight.shape[0] // groups
    columns = size // weight.shape[0]
    if 2 * rank * (rows + columns) >= rows * columns and not branches:
        return "dense"
    if dora:  # y / m is what its magnitudes' gradients are made from; y - b may have lost its digits
        return "merged" if bias is None else "dense"
    return "branch" if branches or moved < 2 * size else "merged"


def dense_pays(
    positions: int, inputs: int, weight: Tensor, groups: int, rank: int, dtype: torch.dtype
) -> bool:
    """Whether the gradients of A and B are made faster from dW' than from products of r channels, where this
    is no CPU. Each product takes the longer of its bytes and its operations, of which `operations_a_byte`
    take as long as a byte; a call takes as long as `CALL` bytes. All in bytes, with T positions:

    - dense: dW' reads x and dY, and takes 2·T·columns·out operations; dW' of N numbers is made float32 and
      read by two products, 14·N bytes; three calls.
    - factored: h = conv(x, A) and dA each read x, G = s·Bᵀ·dY and dB each read dY; 2·T·groups·r·columns and
      2·T·r·out operations, where tensor cores take r for at least `TILE`; about eight calls.

    So most layers take dW' (of ResNet-50 with 256 images all but the 3×3 ones of 256 channels and more), but
    none where it would be half of a layer's time. In float16 all do, where conv(x, A) may overflow.

    Args:
        positions: T, batch times output positions.
        inputs: numbers in x.
        rank: of each group.
        dtype: of the products.
    """
    if dtype == torch.float16:
        return True
    out, size, rate = weight.shape[0], weight.numel(), operations_a_byte(dtype)
    seen, made, rows = dtype.itemsize * inputs, dtype.itemsize * positions * out, max(rank, TILE)
    twice_by_x = 2 * max(seen, 2 * positions * groups * rows * (size // out) / rate)
    twice_by_dY = 2 * max(made, 2 * positions * rows * out / rate)
    dense = max(seen + made, 2 * positions * size / rate) + 14 * size + 3 * CALL
    return dense <= twice_by_x + twice_by_dY + 8 * CALL


def operations_a_byte(dtype: torch.dtype) -> int:
    """How many operations of a product a GPU does while it moves a byte. Of one H100, at 2.6 TB/s: 650
    TFLOP/s in half precision, half of that with TF32, which torch's convolutions take unless told otherwise,
    and 50 without."""
    if dtype.itemsize < 4:
        return 200
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # set at run time
    return 100 if dtype == torch.float32 and tf32 else 20
