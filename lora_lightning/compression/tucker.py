"""A kernel between fewer channels, 1×1 before and after it (Kim et al. 2016, arXiv 1511.06530), here by a
projection of each side."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.compression.convolutions import CONVS, conv, options_of
from lora_lightning.compression.form import Form, Layer, Part, Rank, Solved, ranks_for
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.product import balanced, leading

GRID = 12  # of the second rank, the most that are tried


class Tucker(Form):
    """1×1, the kernel between fewer channels, 1×1; ranks of the outputs and of the inputs."""

    whole = True

    def fits(self, layer: Layer) -> bool:
        return isinstance(layer, CONVS) and prod(layer.kernel_size) > 1

    def full(self, layer: Any) -> Rank:
        out, inner, *kernel = layer.weight.shape
        return min(out, inner * prod(kernel)), min(inner, out * prod(kernel))

    def parts(self, layer: Any, rank: Rank) -> list[Part]:
        out, inner, *kernel = layer.weight.shape
        ones = (1,) * len(kernel)
        return [
            Part((rank[1], inner, *ones), "inputs"),
            Part((rank[0], rank[1], *kernel), "outputs"),
            Part((out, rank[0], *ones), "outputs"),
        ]

    def modules(self, layer: Any, rank: Rank) -> list[nn.Module]:
        return [
            conv(layer, layer.weight.shape[1], rank[1], {"kernel_size": 1}),
            conv(layer, rank[1], rank[0], options_of(layer)),
            conv(layer, rank[0], layer.weight.shape[0], {"kernel_size": 1}, last=True),
        ]

    def solve(self, layer: Any, weight: Tensor, moment: Moment) -> Solved:
        return Projected(weight, moment)


class Projected(Solved):
    """A kernel with both sides projected: the outputs as in `Product`, the channels of the inputs by their
    mean moments over the kernel's positions."""

    def __init__(self, weight: Tensor, moment: Moment) -> None:
        self.out, self.inner, self.positions = weight.flatten(2).shape
        self.moment, self.rows = moment, weight.flatten(1)
        self.left, energies = leading(self.rows, moment)
        self.kept = self.left.mT @ self.rows
        self.energies = energies
        self.total = energies.sum().clamp_min(torch.finfo(energies.dtype).tiny)
        sides = weight.flatten(2).transpose(1, 2).reshape(-1, self.inner)  # (out * positions, channels)
        root = None
        if moment.matrix is not None:
            blocks = moment.matrix.view(self.inner, self.positions, self.inner, self.positions)
            values, vectors = torch.linalg.eigh(blocks.diagonal(dim1=1, dim2=3).sum(-1))
            root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
        seen = sides if root is None else sides @ root
        _, directions = torch.linalg.eigh(seen.mT @ seen)
        basis = torch.linalg.qr(seen @ directions.flip(-1)).Q  # (out * positions, k), the leading ones first
        self.core, self.right = basis, basis.mT @ sides

    def _by_second(self, second: int) -> list[float]:
        """The error by the first rank, at one second rank."""
        projected = self.core[:, :second] @ self.right[:second]
        projected = projected.view(self.out, self.positions, self.inner).transpose(1, 2).flatten(1)
        away = self.kept - self.left.mT @ projected
        within = (self.moment.times(away) * away).sum(1)
        rest = torch.cat([self.energies.flip(0).cumsum(0).flip(0), self.energies.new_zeros(1)])
        found = torch.cat([within.new_zeros(1), within.cumsum(0)]) + rest
        lost: list[float] = (found / self.total).clamp_min(0).tolist()
        return lost

    def errors(self) -> Iterator[tuple[Rank, float]]:
        seconds = ranks_for(self.right.shape[0])
        every = -(-len(seconds) // GRID)
        for second in seconds[::every]:
            lost = self._by_second(second)
            for first in ranks_for(len(lost) - 1):
                yield (first, second), lost[first]

    def error(self, rank: Rank) -> float:
        return self._by_second(rank[1])[rank[0]]

    def weights(self, rank: Rank) -> list[Tensor]:
        first, core = balanced(self.right[: rank[1]], self.core[:, : rank[1]])
        core = core.reshape(self.out, self.positions, rank[1]).transpose(1, 2).flatten(1)
        last = self.left[:, : rank[0]]
        return [first, last.mT @ core, last]
