"""Copies of models, also of those that torch alone cannot copy, and of what a model was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """A deep copy. What a hook has computed from parameters, as torch's older `weight_norm` and
    `spectral_norm` do with `weight`, is copied as its values: torch copies no tensor with a graph.

    Args:
        memo: of `copy.deepcopy`.
    """
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    try:
        for module, name, value in found:
            module.__dict__[name] = value.detach()
        return copy.deepcopy(model, memo)
    finally:
        for module, name, value in found:
            module.__dict__[name] = value


@contextmanager
def holding(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which tensors have other values, and after which they have their own again.

    Args:
        values: by the tensors' names, also of another dtype or on another device.
    """
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    _fill(tensors, values)
    try:
        yield
    finally:
        _fill(tensors, own)


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


class Before:
    """What a model is now, for when it has trained.

    Attributes:
        values: its parameters and persistent buffers, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.values = {name: tensor.clone() for name, tensor in self._tensors().items()}

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context in which the model is what it was."""
        tensors = self._tensors()
        self.values = {name: value.to(tensors[name]) for name, value in self.values.items()}  # once
        with holding(tensors, self.values):
            yield

    def _tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in self._model.state_dict().items() if isinstance(t, Tensor)}
