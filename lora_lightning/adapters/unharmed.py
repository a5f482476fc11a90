"""A model that is run for a look at it and then is, bit for bit, as it was: modes, flags, gradients, buffers,
attributes, random numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, MutableSet
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lora_lightning.layers.norm import has_statistics
from lora_lightning.utils.rng import random_state, set_random_state

DEEPEST = 4  # lists within lists that are looked through
Undo = Callable[[], None]


@contextmanager
def unharmed(model: nn.Module, *beside: object) -> Iterator[None]:
    """Within this context the model is run as in training, but without dropout, with the statistics of its
    norms as they are and in torch's plain ways, nothing compiled or fused; afterwards nothing shows that it
    was.

    Args:
        beside: other objects whose attributes are put back, such as a data module.
    """
    random = random_state()
    modules = list(model.modules())
    undo = [_attributes(thing) for thing in (*modules, *beside)]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    fused = torch.backends.mha.get_fastpath_enabled()
    for module in modules:
        if has_statistics(module) or isinstance(module, (_DropoutNd, nn.MultiheadAttention)):
            module.training = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for back in undo:
            back()
        for parameter, trains, gradient in parameters:
            parameter.requires_grad_(trains)
            parameter.grad = gradient
        set_random_state(random)


def _attributes(thing: object) -> Undo:
    """Give an object its attributes back: what they were and what they held."""
    return _undo(vars(thing), DEEPEST) or (lambda: None)


def _undo(value: Any, depth: int) -> Undo | None:
    """What gives a value back what it holds now; None where it holds nothing that is followed."""
    if isinstance(value, nn.Parameter):
        return None  # nothing here takes a step
    if isinstance(value, Tensor):
        return partial(_put_back, value, value._version, value.detach().clone())
    if not depth:
        return None
    if isinstance(value, MutableMapping):
        kept = dict(value)
        return partial(_refill, value.update, value.clear, kept, _inner(kept.values(), depth))
    if isinstance(value, (list, deque)):
        items = list(value)
        return partial(_refill, value.extend, value.clear, items, _inner(items, depth))
    if isinstance(value, MutableSet):
        return partial(_refill, value.__ior__, value.clear, set(value), [])
    return None


def _inner(values: Any, depth: int) -> list[Undo]:
    return [undo for value in values if (undo := _undo(value, depth - 1))]


def _refill(fill: Callable[[Any], Any], empty: Undo, kept: Any, inner: list[Undo]) -> None:
    empty()
    fill(kept)
    for undo in inner:
        undo()


@torch.no_grad()
def _put_back(tensor: Tensor, version: int, kept: Tensor) -> None:
    if tensor._version != version:
        tensor.copy_(kept)
