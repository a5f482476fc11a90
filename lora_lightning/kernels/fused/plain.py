"""The fused operators in torch's own operations: the way without Triton, and what it is compared with.

Shapes as in `kernels.fused.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import dora
from lora_lightning.kernels.common import wide_product
from lora_lightning.kernels.half import SMALLEST
from lora_lightning.kernels.quantized_tensor import DEQUANTIZERS
from lora_lightning.kernels.rounding import dithered_, dithers, mixed

ALIGNED = 16  # E's rows are of so many numbers, or multiples: a kernel else reads them piece by piece


def width(d_in: int, rank: int) -> int:
    """The columns of E."""
    return d_in + -(-rank // ALIGNED) * ALIGNED


def merge(W: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, adds: bool = True) -> Tensor:
    """E = [W + s·B·A | s·B | 0], the sum in float32 or better; without `adds` W alone."""
    wide = torch.promote_types(torch.promote_types(W.dtype, dtype), torch.float32)
    up = B.to(wide) * scaling
    merged = torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=scaling) if adds else W.to(wide)
    merged = dithered_(merged, dtype) if adds and dithers(W.dtype, dtype) else merged.to(dtype)
    d_out, d_in = W.shape
    E = merged.new_zeros(d_out, width(d_in, A.shape[0]))
    E[:, :d_in] = merged
    E[:, d_in : d_in + A.shape[0]] = up.to(dtype)
    return E


def merge_quantized(
    codes: Tensor,
    scales: Tensor,
    kind: str,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    adds: bool = True,
) -> Tensor:
    """The same of a W in 8 or 4 bits."""
    return merge(dequantized(codes, scales, kind, (B.shape[0], A.shape[1])), A, B, scaling, dtype, adds)


def dequantized(codes: Tensor, scales: Tensor, kind: str, shape: tuple[int, int]) -> Tensor:
    """W of a `QuantizedTensor`'s codes, in float32."""
    return DEQUANTIZERS[kind](codes, scales, shape, torch.float32)


def magnitude_gradient(dY: Tensor, y: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
    """dm = (dY∘(y - b)).sum(0) / m, (d_out,), in float32 or better; 0 where m is."""
    wide = torch.promote_types(dY.dtype, torch.float32)
    own = y.to(wide) if bias is None else y.to(wide) - bias.to(wide)
    return dora.magnitude_gradient((dY.to(wide) * own).sum(0), magnitude.to(wide))


def factor_gradients(
    dY: Tensor,
    u: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    source: str,
    A: Tensor,
    G: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dA = Gᵀ·X and dB = s·dYᵀ·(X·Aᵀ), in float32 or better; X is rounded to dY's dtype first."""
    X = SOURCES[source](u, mean, rstd, weight, bias).to(dY.dtype)
    X = X if seed is None else dropped(X, dropout, seed)
    wide = torch.promote_types(dY.dtype, torch.float32)
    down, c = shared_out(A, dY.dtype)
    H = X @ down.to(dY.dtype).t()  # (T, r)
    dB = wide_product(dY.t(), H, wide) * scaling
    return wide_product(G.t(), X, wide), dB if c is None else dB * c


def dropped_low_rank(x: Tensor, A: Tensor, dropout: float, seed: Tensor, beside: bool) -> Tensor:
    """X̃·Aᵀ and zeros, or x and these beside it."""
    H = dropped(x, dropout, seed) @ A.to(x.dtype).t()
    H = F.pad(H, (0, width(0, A.shape[0]) - A.shape[0]))
    return torch.cat([x, H], dim=1) if beside else H


def dropped_sum(dX: Tensor, G: Tensor, A: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """dX + M∘(G·A) / (1 - p)."""
    return dX + dropped(G @ A.to(G.dtype), dropout, seed)


def dropped(x: Tensor, dropout: float, seed: Tensor, first: int = 0) -> Tensor:
    """X̃ of rows of a matrix, of which the first has this number."""
    return torch.where(kept(len(x), x.shape[1], dropout, seed, first), x / (1 - dropout), 0)


def kept(rows: int, columns: int, dropout: float, seed: Tensor, first: int = 0) -> Tensor:
    """Dropout's mask M, (rows, columns), bool: by random bits of an entry's row, column and the seed, so that
    nobody need save it."""
    row, column = (torch.arange(n, device=seed.device) for n in (rows, columns))
    low = 0xFFFFFFFF
    bits = ((mixed((row + first) ^ seed)[:, None] ^ mixed(column + 0x9E3779B9)) * 0x7FEB352D) & low
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & low
    return (bits >> 1) >= threshold(dropout)


def threshold(dropout: float) -> int:
    """Of 31 random bits, below which an entry is dropped."""
    return round(dropout * 2**31)


def shared_out(A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A / c and c, (r,), with which X·(A / c)ᵀ is at most half of X's largest entry: in float16, whose
    largest number is 65,504, H = X·Aᵀ could overflow. A and None in other dtypes."""
    if dtype != torch.float16:
        return A, None
    c = 2 * torch.linalg.vector_norm(A, 1, dim=1).clamp_min(SMALLEST)
    return A / c[:, None], c


def _layer_norm(u: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = (u.to(mean.dtype) - mean[:, None]) * rstd[:, None]
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def _rms_norm(u: Tensor, mean: None, rstd: Tensor, weight: Tensor | None, bias: None) -> Tensor:
    x = u.to(rstd.dtype) * rstd[:, None]
    return x if weight is None else x * weight.to(x.dtype)


def _entries(function: Callable[[Tensor], Tensor], u: Tensor, *norms: Tensor | None) -> Tensor:
    return function(u)


SOURCES: dict[str, Callable[..., Tensor]] = {
    "identity": partial(_entries, lambda u: u),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "gelu": partial(_entries, F.gelu),
    "gelu_tanh": partial(_entries, partial(F.gelu, approximate="tanh")),
    "silu": partial(_entries, F.silu),
    "relu": partial(_entries, F.relu),
}


def rows(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The matrices with neighbours in a row side by side, as a kernel reads them."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]
