"""Saved-source recomputation: an input that can be made again from what its maker saved is not saved.

A layer norm saves its own input, mean and reciprocal deviation for its backward; GELU and SiLU save their
input. A LoRA layer behind one of them needs its input again for A's gradient: it keeps references to those
tensors, which are alive anyway, and computes its input from them, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A matrix (rows, columns) as a function of saved tensors.

    Attributes:
        rowwise: tensors of as many rows.
        shared: tensors that are the same for all rows.
        compute: (*rowwise, *shared) -> the matrix, for any part of the rows.
    """

    rowwise: tuple[Tensor, ...]
    shared: tuple[Tensor | None, ...]
    compute: Callable[..., Tensor]

    @property
    def is_input(self) -> bool:
        """Whether it is the matrix itself."""
        return self.compute is itself


def source_of(x: Tensor, recompute: bool = True) -> Source:
    """Where to get x from in the backward: x itself, or what the function that made it saved.

    Args:
        x: (..., columns).
        recompute: false always keeps x itself.
    """
    maker = x.grad_fn
    find = _FINDERS.get(maker.name()) if recompute and maker is not None else None
    if find is not None and x._version == 0 and x.is_contiguous():
        try:
            found = find(maker, x)
        except RuntimeError:  # its saved tensors were freed, or changed in place
            found = None
        if found is not None:
            return found
    return Source((x,), (), itself)


def itself(x: Tensor) -> Tensor:
    return x


def _layer_norm(maker: Any, x: Tensor) -> Source | None:
    source, mean, deviation = (_saved(maker, name) for name in ("input", "result1", "result2"))
    if source is None or mean is None or deviation is None:
        return None
    last_dimension = tuple(maker._saved_normalized_shape) == x.shape[-1:]
    if not last_dimension or not _fits(source, x) or mean.element_size() < 4:
        return None
    shared = _saved(maker, "weight"), _saved(maker, "bias")
    return Source((source, mean, deviation), shared, partial(_normalize, x.dtype))


def _normalize(
    dtype: torch.dtype, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """In the order of operations of torch's kernel, so that the result is the same to the last bit."""
    y = (x.to(mean.dtype) - mean).mul(deviation)
    if weight is not None:
        weight = weight.to(y.dtype)
        y = y * weight if bias is None else torch.addcmul(bias.to(y.dtype), y, weight)
    return y.to(dtype)


def _activation(function: Callable[..., Tensor], maker: Any, x: Tensor) -> Source | None:
    source = _saved(maker, "self")
    return Source((source,), (), function) if source is not None and _fits(source, x) else None


def _gelu(maker: Any, x: Tensor) -> Source | None:
    return _activation(partial(F.gelu, approximate=maker._saved_approximate), maker, x)


_FINDERS: dict[str, Callable[[Any, Tensor], Source | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": _gelu,
    "SiluBackward0": partial(_activation, F.silu),
}


def _saved(maker: Any, name: str) -> Tensor | None:
    """A saved tensor of an autograd node.

    Raises:
        RuntimeError: it is gone, or a hook packed it: unpacking could recompute a whole checkpointed
            block. A hook that packs tensors as themselves says so by an attribute `identity`.
    """
    raw = getattr(maker, f"_raw_saved_{name}")
    if raw.unpack_hook is not None and not getattr(raw.unpack_hook, "identity", False):
        raise RuntimeError("packed by a hook")
    tensor: Tensor | None = getattr(maker, f"_saved_{name}")
    return tensor


def _fits(source: Tensor, x: Tensor) -> bool:
    return source.shape == x.shape and source.is_contiguous()
