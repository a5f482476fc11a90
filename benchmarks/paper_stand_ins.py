"""What the meta device would run otherwise than a GPU: attention and dropout as one kernel, cuDNN's LSTM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 8  # entries in the last dimension of a mask that the memory-efficient kernel takes
RESERVED = 6  # states of a unit that cuDNN keeps for the backward: four gates, cell, output
LSTM = 2  # cuDNN's number of this mode


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it attention, dropout and `nn.LSTM` run the operators that they run on CUDA."""
    places = ((F, "scaled_dot_product_attention"), (torch._VF, "lstm"), (torch._VF, "dropout"))
    own = [getattr(place, name) for place, name in places]
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cudnn_rnn", _cudnn_rnn, "Meta", allow_override=True)
        library.impl("_cudnn_rnn_backward", _cudnn_rnn_backward, "Meta")
        try:
            for (place, name), function in zip(places, (_attention, _lstm, _dropout), strict=True):
                setattr(place, name, function)
            yield
        finally:
            for (place, name), function in zip(places, own, strict=True):
                setattr(place, name, function)


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """Dropout.cpp: without training none, else one kernel, and one in the backward."""
    return torch.native_dropout(x, p, True)[0] if train and p else x


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Flash attention in half precision without a mask, else the memory-efficient, as attention.cpp."""
    query, key, value, attn_mask = (_as_autocast(t) for t in (query, key, value, attn_mask))
    if attn_mask is None and query.element_size() == 2:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if attn_mask is not None:
        width, missing = attn_mask.shape[-1], -attn_mask.shape[-1] % ALIGNED
        if missing:
            attn_mask = F.pad(attn_mask, (0, missing))[..., :width]
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _as_autocast(tensor: Any) -> Any:
    """As autocast hands it to an operator that it runs in half precision."""
    if tensor is None or tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _lstm(
    x: Tensor, state: tuple[Tensor, Tensor], weights: list[Tensor], biases: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """RNN.cpp. Weights of the module itself lie in one buffer (`flatten_parameters`), made ones do not; what
    autocast casts it puts into a new one (cudnn/RNN.cpp)."""
    given = [x, *state, *weights]
    x, hx, cx, *weights = (_as_autocast(t) for t in given)
    flat = all(isinstance(w, nn.Parameter) for w in weights) or weights[0] is not given[3]
    buffer = weights[0].new_empty(sum(w.numel() for w in weights)) if flat else None
    size, per_layer = hx.shape[2], 4 if biases else 2
    return torch.ops.aten._cudnn_rnn(
        x, list(weights), per_layer, buffer, hx, cx, LSTM, size, 0, layers, batch_first, dropout, train,
        bidirectional, [], None,
    )[:3]  # fmt: skip


def _cudnn_rnn(
    x: Tensor, weights: list[Tensor], per_layer: int, buffer: Tensor | None, hx: Tensor, cx: Tensor,
    mode: int, size: int, projected: int, layers: int, batch_first: bool, dropout: float, train: bool,
    both: bool, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    output = x.new_empty((*x.shape[:2], (2 if both else 1) * size))
    reserve = x.new_empty(RESERVED * layers * output.nbytes if train else 0, dtype=torch.uint8)
    if buffer is None:
        buffer = x.new_empty(sum(w.numel() for w in weights))
    return output, torch.empty_like(hx), torch.empty_like(cx), reserve, buffer


def _cudnn_rnn_backward(
    x: Tensor, weights: list[Tensor], per_layer: int, buffer: Tensor, hx: Tensor, cx: Tensor, *rest: Any
) -> tuple[Any, ...]:
    made = [torch.empty_like(w) for w in weights] if rest[-1][3] else []
    return torch.empty_like(x), torch.empty_like(hx), torch.empty_like(cx), made
