"""Weight norm in a state dict: W = g · v / ‖v‖ (Salimans and Kingma 2016, arXiv 1602.07868, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = (("parametrizations.{}.original0", "parametrizations.{}.original1"), ("{}_g", "{}_v"))


def normed_parts(state: Mapping[str, Tensor], name: str) -> tuple[str, str] | None:
    """The names of g and v, as torch calls them or did, where the state has them for the weight `name`."""
    module, dot, leaf = name.rpartition(".")
    for pair in NAMES:
        g, v = (module + dot + part.format(leaf) for part in pair)
        if g in state and v in state and _dim(state[g], state[v]) is not None:
            return g, v
    return None


def normed_weight(g: Tensor, v: Tensor) -> Tensor:
    """W, of v's shape and dtype."""
    dim = _dim(g, v)
    assert dim is not None
    return torch._weight_norm(v, g, dim)


def parts_of(weight: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """g and v, of the shapes and dtypes of those given, that give `weight`: its norms, and itself."""
    dim = _dim(g, v)
    assert dim is not None
    return torch.norm_except_dim(weight.double(), 2, dim).to(g.dtype), weight.to(v.dtype)


def _dim(g: Tensor, v: Tensor) -> int | None:
    """The dimension that has a norm for each index, -1 for one norm of all; None where g is no norms of v."""
    if g.dim() == 0:
        return -1
    shapes = [[m if i == d else 1 for i, m in enumerate(v.shape)] for d in range(v.dim())]
    return next((d for d, shape in enumerate(shapes) if shape == [*g.shape]), None)
