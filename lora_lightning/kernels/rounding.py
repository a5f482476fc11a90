"""How W' is rounded where W is of half precision and has no low bits of its own: by a dither.

Rounding to nearest would take nothing of an update of less than half a unit in the last place of W; a dither
takes of every entry's as much as it is, in the mean over the entries. What is rounded lies between two
numbers of the dtype and becomes the upper one with a probability of its distance from the lower; what is one
of them stays. The noise is of an entry's place alone, the same at each step, so that W' moves only as A and
B do.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
HIGH = 1 if sys.byteorder == "little" else 0  # where a float32 has its upper half


def dithers(source: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a sum with a weight of the dtype `source` is rounded to `dtype` by a dither: where the weight
    is of that dtype itself. Else it has low bits of its own, which do the same for rounding to nearest."""
    return source == dtype and dtype in HALF


def rounded(sums: Tensor, source: torch.dtype) -> Tensor:
    """Sums with a weight of the dtype `source`, in that dtype again; their gradient is that of a cast."""
    if not dithers(source, source) or sums.dtype != torch.float32:
        return sums.to(source)
    with torch.no_grad():
        values = dithered_(sums.detach().clone(memory_format=torch.contiguous_format), source)
        change = values.float() - sums
    return (sums + change).to(source)


def dithered_(sums: Tensor, dtype: torch.dtype, matrices: int = 1) -> Tensor:
    """`sums` in half precision.

    Args:
        sums: float32, contiguous; overwritten.
        matrices: how many weights they are, one after another: each is rounded as alone.

    Returns:
        Of the same shape, a view into `sums` or fresh memory.
    """
    noise = _noise(sums.numel() // matrices, sums.device)
    bits = sums.view(torch.int32).view(matrices, -1)
    if dtype == torch.bfloat16:
        bits.clamp_(max=0x7FC00000)  # a GPU's NaN is 0x7FFFFFFF, which would overflow
        bits.add_(noise, alpha=2)
        return sums.view(dtype)[..., HIGH::2]
    fine = noise >> 2  # of the 13 bits that float16 has no place for
    normal = ((bits.clamp(max=0x7FC00000) + fine) & -0x2000).view(torch.float32)
    values = sums.view(matrices, -1)
    small = (values * 2**24 + fine * 2.0**-13).floor() * 2.0**-24
    return torch.where(values.abs() < 2.0**-14, small, normal).view(sums.shape).to(dtype)


def mixed(place: Tensor) -> Tensor:
    """32 random bits of each number, in int64: lowbias32 of Chris Wellons' hash prospector."""
    low = 0xFFFFFFFF
    x = place & low
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)


def _noise(size: int, device: torch.device) -> Tensor:
    """15 bits for each of the first places, in int16."""
    return _table(1 << (size - 1).bit_length() if size else 0, device)[:size]


@cache
def _table(size: int, device: torch.device) -> Tensor:
    return (mixed(torch.arange(size, device=device)) >> 17).to(torch.int16)
