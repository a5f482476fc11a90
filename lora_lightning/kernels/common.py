"""What the autograd functions share: whether they may run, dtypes of products, passes in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lora_lightning.kernels.quantized_tensor import QuantizedTensor

CACHED = 3 * 2**18  # bytes of a matrix that a pass takes at a time for each thread
PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})  # what a function of ours may be given
WIDENING = frozenset({"cuda", "meta"})  # devices with products of half precision that are given in float32


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether an autograd function of ours may run on these tensors.

    A compiler sees more in plain operations than in a function of ours, function transforms and forward
    mode have no rule for one, and subclasses (DTensor, fake tensors) define operations alone.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and PLAIN.issuperset(map(type, tensors))
    )


def on_cpu(device: torch.device) -> bool:
    """Whether the rules of a CPU hold. All other devices have one rule, so that the meta device counts what a
    GPU runs; called as `common.on_cpu`, so that a test can take that road on a CPU."""
    return device.type == "cpu"


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


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the microseconds that it takes to do nothing; a quantized one as floats."""
    if type(tensor) is QuantizedTensor:
        return tensor.dequantize(dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed over the tokens and given in `dtype`, a wider one or their own."""
    if left.dtype == dtype:
        return left @ right
    if left.device.type in WIDENING:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)  # other devices have no product of mixed dtypes


def pieces(tensor: Tensor, sizes: list[int], dim: int = 0) -> Sequence[Tensor]:
    """The tensor in parts of so many tokens, or columns, each."""
    return (tensor,) if len(sizes) == 1 else torch.split_with_sizes(tensor, sizes, dim)


def graph_gradients(
    y: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], dY: Tensor
) -> Iterator[Tensor | None]:
    """The gradients of y by those inputs that need one, None for the others, as functions of dY and of the
    inputs: where a graph of the backward is asked for."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dY, create_graph=True))
    return (next(found) if need else None for need in needs)
