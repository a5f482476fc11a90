"""Saved-source recomputation: an input that can be made again from what its maker saved is not saved.

A layer norm saves its own input, mean and reciprocal deviation for its backward; GELU and SiLU save their
input. A LoRA layer behind one of them needs its input again for A's gradient: it keeps references to those
tensors, which are alive anyway, and computes its input from them, a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lora_lightning.kernels import common
from lora_lightning.kernels.common import cast, without_autocast

LEAST = 2**20  # bytes of an input; making a smaller one again takes longer than it saves
LEAST_OFF_CPU = 2**24  # where a call takes as long as a pass over some MiB


@dataclass(frozen=True)
class RecomputeSource:
    """A matrix (tokens, features) as a function of saved tensors.

    Attributes:
        rowwise: tensors of as many tokens.
        shared: tensors that are the same for all tokens.
        compute: (*rowwise, *shared, buffer) -> the matrix, for any part of the tokens; it may be written
            into the buffer, of its shape and dtype. None allocates.
    """

    rowwise: tuple[Tensor, ...]
    shared: tuple[Tensor | None, ...]
    compute: Callable[..., Tensor]

    def whole(self) -> Tensor:
        """The matrix."""
        return self.compute(*self.rowwise, *self.shared, None)


def source_of(x: Tensor) -> RecomputeSource | None:
    """What to make x, (..., columns), from in the backward: what the function that made it saved. None is x
    itself."""
    maker = x.grad_fn
    find = None if maker is None else _FINDERS.get(maker.name())
    if find is None or x._version or not x.is_contiguous():
        return None
    try:
        return find(maker, x)
    except RuntimeError:  # its saved tensors were freed, or changed in place
        return None


def _layer_norm(maker: Any, x: Tensor) -> RecomputeSource | None:
    source, mean, deviation = (saved_tensor(maker, name) for name in ("input", "result1", "result2"))
    if source is None or mean is None or deviation is None:
        return None
    last_dimension = tuple(maker._saved_normalized_shape) == x.shape[-1:]
    if not last_dimension or not source.is_contiguous() or source.shape != x.shape or mean.element_size() < 4:
        return None
    shared = saved_tensor(maker, "weight"), saved_tensor(maker, "bias")
    if not common.on_cpu(x.device) and (epsilon := _epsilon(shared[0])) is not None:
        return RecomputeSource((source,), shared, partial(_normalize_again, epsilon))
    return RecomputeSource((source, mean, deviation), shared, partial(_normalize, x.dtype))


def _normalize(
    dtype: torch.dtype,
    x: Tensor,
    mean: Tensor,
    deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    buffer: Tensor | None,
) -> Tensor:
    """In the order of operations of torch's kernel, so that the result is the same to the last bit."""
    if torch.is_grad_enabled():  # for a second derivative
        mean, deviation = centre_and_scale(cast(x, mean.dtype), deviation)
    if buffer is not None and buffer.dtype != mean.dtype:
        buffer = None
    y = torch.sub(cast(x, mean.dtype), mean, out=buffer)
    y = torch.mul(y, deviation, out=buffer)
    if weight is not None and bias is not None:
        y = torch.addcmul(cast(bias, y.dtype), y, cast(weight, y.dtype), out=buffer)
    elif weight is not None:
        y = torch.mul(y, cast(weight, y.dtype), out=buffer)
    return cast(y, dtype)


def remember_norms(model: nn.Module) -> None:
    """Note the layer norms' ε, which a graph does not tell: with it one call of torch's own function makes
    their outputs again, where on a GPU the pieces of `_normalize` would each be a call and a pass over
    memory."""
    _NORMS.update(m for m in model.modules() if isinstance(m, nn.LayerNorm) and m.elementwise_affine)


_NORMS: WeakSet[nn.LayerNorm] = WeakSet()
# A layer norm's weight -> its ε, or None where it is not known.
_EPSILONS: MutableMapping[Tensor, float | None] = WeakIdKeyDictionary()


def _epsilon(weight: Tensor | None) -> float | None:
    """The ε of the layer norm of this weight; modules may have been given new weights since they were
    noted."""
    if weight is None:
        return None
    if weight not in _EPSILONS:
        _EPSILONS[weight] = None
        _EPSILONS.update((norm.weight, norm.eps) for norm in _NORMS)
    return _EPSILONS[weight]


def _normalize_again(
    epsilon: float, x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None
) -> Tensor:
    with without_autocast(x.device.type):
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def centre_and_scale(x: Tensor, scale: Tensor, centred: bool = True) -> tuple[Tensor, Tensor]:
    """A norm's mean and reciprocal deviation as functions of its input (..., d): what it saved are numbers.
    Its ε is what the saved ones say."""
    mean = x.mean(-1, keepdim=True) if centred else torch.zeros_like(scale)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return mean, (variance + (scale.pow(-2) - variance).detach()).rsqrt()


def _activation(function: Callable[..., Tensor], maker: Any, x: Tensor) -> RecomputeSource | None:
    source = saved_tensor(maker, "self")
    if source is None or source.shape != x.shape or not source.is_contiguous():
        return None
    return RecomputeSource((source,), (), partial(_activate, function))


def _activate(function: Callable[..., Tensor], x: Tensor, buffer: Tensor | None) -> Tensor:
    return function(x) if buffer is None else function(x, out=buffer)


def _gelu(maker: Any, x: Tensor) -> RecomputeSource | None:
    return _activation(partial(torch._C._nn.gelu, approximate=maker._saved_approximate), maker, x)


_FINDERS: dict[str, Callable[[Any, Tensor], RecomputeSource | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": _gelu,
    "SiluBackward0": partial(_activation, torch._C._nn.silu),
}


def saved_tensor(maker: Any, name: str) -> Tensor | None:
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
