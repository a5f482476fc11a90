"""What the autograd functions share: whether they may run, dtypes of products, passes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lora_lightning.kernels.quantized_tensor import is_quantized

CACHED = 3 * 2**18  # bytes of a matrix that a pass takes at a time for each thread


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether an autograd function of ours may run on these tensors.

    A compiler sees more in plain operations than in a function of ours, function transforms and forward
    mode have no rule for one, and subclasses (DTensor, fake tensors) define operations alone.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


def chunks(tokens: int, width: int, like: Tensor) -> tuple[list[int], int]:
    """How many tokens to take at a time in a pass over matrices of `width` columns, and in how many equal
    parts for as many threads; what cannot be so divided comes last.

    On a CPU products with a few columns are bound by memory: with 768 KiB for each thread at a time each
    pass after the first reads that core's cache; beyond 4 MiB the buffer would be fresh memory at each call.
    Half precision is not summed up piece by piece.
    """
    size, threads = width * like.element_size(), torch.get_num_threads()
    if like.device.type != "cpu" or like.element_size() < 4 or tokens * size <= CACHED:
        return [tokens], 1
    step = threads * max(64, CACHED * min(threads, 8) // threads // size)
    whole, rest = divmod(tokens, step)
    last = rest % threads
    return [n for n in (*[step] * whole, rest - last, last) if n], threads


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; the meta device has none (asked by name, which every compiler follows)."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off where it is on."""
    if not autocasts(device_type):
        return nullcontext()  # turning off what is off would take as long as a small product
    return torch.autocast(device_type, enabled=False)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: autocast's dtype where it acts, else x's own."""
    if x.dtype == torch.float64 or not autocasts(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def row_norms(weight: Tensor) -> Tensor:
    """‖row‖ of each output, (d_out,); m / norm is 1 for a row of zeros, not NaN."""
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def magnitude_gradient(sums: Tensor, magnitude: Tensor) -> Tensor:
    """dm from dY∘(y - b) summed up for each output, (d_out,), which is m·dm.

    Where m is 0 it is taken for 0: so it is for a row of zeros in W, which is where a magnitude begins at 0.
    """
    return torch.where(magnitude == 0, 0.0, sums / magnitude)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the microseconds that it takes to do nothing; a quantized one as floats."""
    if is_quantized(tensor):
        return tensor.dequantize(dtype)  # type: ignore[call-arg]  # ours, not torch's
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def pieces(tensor: Tensor, sizes: list[int], dim: int = 0) -> Sequence[Tensor]:
    """The tensor in parts of so many tokens, or columns, each."""
    return (tensor,) if len(sizes) == 1 else torch.split_with_sizes(tensor, sizes, dim)
