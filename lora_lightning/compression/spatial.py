"""A kernel of two dimensions by two of one: k×1, then 1×k (Jaderberg et al. 2014, arXiv 1405.3866)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.compression.convolutions import conv, options_of
from lora_lightning.compression.form import Form, Layer, Part, Rank, Solved, ranks_for
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.product import balanced, leading, shares


class Spatial(Form):
    """k×1, then 1×k: a kernel of two dimensions by two of one."""

    whole = True

    def fits(self, layer: Layer) -> bool:
        return isinstance(layer, nn.Conv2d) and min(layer.kernel_size) > 1

    def full(self, layer: Any) -> Rank:
        out, inner, high, wide = layer.weight.shape
        return (min(inner * high, out * wide),)

    def parts(self, layer: Any, rank: Rank) -> list[Part]:
        out, inner, high, wide = layer.weight.shape
        return [Part((rank[0], inner, high, 1), "between"), Part((out, rank[0], 1, wide), "outputs")]

    def modules(self, layer: Any, rank: Rank) -> list[nn.Module]:
        options = options_of(layer)
        along = [{n: v if isinstance(v, str) else (v[0], z) for n, v, z in _each(options, 0)}]
        along += [{n: v if isinstance(v, str) else (z, v[1]) for n, v, z in _each(options, 1)}]
        return [
            conv(layer, layer.weight.shape[1], rank[0], along[0]),
            conv(layer, rank[0], layer.weight.shape[0], along[1], last=True),
        ]

    def solve(self, layer: Any, weight: Tensor, moment: Moment) -> Solved:
        return Separated(weight, moment)


class Separated(Solved):
    """A kernel by columns, then rows: the leading products for the mean moments of a column, with the error
    that the product makes in the whole kernel."""

    def __init__(self, weight: Tensor, moment: Moment) -> None:
        out, inner, high, wide = weight.shape
        matrix = weight.permute(0, 3, 1, 2).reshape(out * wide, inner * high)
        column = Moment()
        if moment.matrix is not None:
            blocks = moment.matrix.view(inner, high, wide, inner, high, wide)
            column.matrix = blocks.diagonal(dim1=2, dim2=5).sum(-1).reshape(inner * high, inner * high)
        self.left, energies = leading(matrix, column)
        self.right = self.left.mT @ matrix
        self.shape = weight.shape
        self.lost = shares(energies)
        if moment.matrix is not None:
            self.lost = self._measured(weight, moment, blocks)

    def _measured(self, weight: Tensor, moment: Moment, blocks: Tensor) -> list[float]:
        """‖(W − Ŵ)X‖² / ‖WX‖² at every rank, from the products of the components with each other."""
        out, inner, high, wide = self.shape
        parts = self.left.view(out, wide, -1)
        rows = weight.flatten(1)
        toward = moment.times(rows).view(out, inner * high, wide)
        each = self.right.new_zeros(len(self.right))
        gram = self.right.new_zeros(len(self.right), len(self.right))
        for a in range(wide):
            each += ((parts[:, a].mT @ toward[:, :, a]) * self.right).sum(1)
            for b in range(wide):
                block = blocks[:, :, a, :, :, b].reshape(inner * high, inner * high)
                gram += (parts[:, a].mT @ parts[:, b]) * (self.right @ block @ self.right.mT)
        total = (toward.flatten(1) * rows).sum().clamp_min(torch.finfo(rows.dtype).tiny)
        found = total - 2 * each.cumsum(0) + gram.cumsum(0).cumsum(1).diagonal()
        lost: list[float] = [1.0, *(found / total).clamp_min(0).tolist()]
        return lost

    def errors(self) -> Iterator[tuple[Rank, float]]:
        return (((r,), self.lost[r]) for r in ranks_for(len(self.lost) - 1))

    def error(self, rank: Rank) -> float:
        return self.lost[rank[0]]

    def weights(self, rank: Rank) -> list[Tensor]:
        out, _, _, wide = self.shape
        first, last = balanced(self.right[: rank[0]], self.left[:, : rank[0]])
        return [first, last.reshape(out, wide, -1).transpose(1, 2).flatten(1)]


def _each(options: dict[str, Any], axis: int) -> Iterable[tuple[str, Any, int]]:
    """Options with what the other dimension has of each."""
    return ((name, value, 0 if name == "padding" else 1) for name, value in options.items())
