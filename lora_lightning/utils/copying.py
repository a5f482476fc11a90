"""Copies of models, also of those that torch alone cannot copy."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

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
