"""How a layer becomes smaller plain ones: a form says for which layers, of which shapes, with which values.

`svd` is Eckart and Young's; `channel` is of Zhang et al. 2015 (arXiv 1505.06798); `spatial` of Jaderberg et
al. 2014 (arXiv 1405.3866); `tucker` of Kim et al. 2016 (arXiv 1511.06530), here by a projection of each side.
Where the inputs' second moments are known, every form keeps what matters for the output (SVD-LLM, arXiv
2403.07378). A new form is a class of its own and a line in `FORMS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.compression.moment import Moment

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Rank = tuple[int, ...]
STEP = 16  # ranks that oneDNN's kernels like
SMALL = (4, 8)  # ranks below it
ALL = 64  # sides below it may have every rank
GRID = 12  # of the second rank, the most that are tried


@dataclass(frozen=True)
class Part:
    """One of the layers that take the place of another.

    Attributes:
        shape: of its weight.
        place: where its outputs lie: at the "inputs" or "outputs" of the layer, or "between".
    """

    shape: tuple[int, ...]
    place: str

    @property
    def size(self) -> int:
        """Entries of its weight."""
        return prod(self.shape)


class Solved(ABC):
    """A weight taken apart in a form."""

    @abstractmethod
    def errors(self) -> Iterator[tuple[Rank, float]]:
        """Ranks worth a look, and of each the share of the output that is lost, ‖(W − Ŵ)X‖² / ‖WX‖²."""

    @abstractmethod
    def error(self, rank: Rank) -> float:
        """That share at one rank."""

    @abstractmethod
    def weights(self, rank: Rank) -> list[Tensor]:
        """Of the parts, flattened after their first dimension."""


class Form(ABC):
    """How a layer becomes a chain of smaller ones.

    Attributes:
        whole: whether it needs the whole matrix of second moments where there are data.
    """

    whole = False

    @abstractmethod
    def fits(self, layer: Layer) -> bool:
        """Whether such a layer can be brought into this form."""

    @abstractmethod
    def full(self, layer: Layer) -> Rank:
        """The ranks at which nothing is lost."""

    @abstractmethod
    def parts(self, layer: Layer, rank: Rank) -> list[Part]:
        """What the layer becomes."""

    @abstractmethod
    def modules(self, layer: Layer, rank: Rank) -> list[nn.Module]:
        """The parts as plain modules without values, on the layer's device, in its dtype; the last one has
        the layer's bias."""

    @abstractmethod
    def solve(self, layer: Layer, weight: Tensor, moment: Moment) -> Solved:
        """Take a weight apart, in float64."""


def ranks_for(side: int) -> list[int]:
    """The ranks below a side that are tried: all of a small one, else multiples of 16."""
    if side < ALL:
        return list(range(1, side))
    return [*SMALL, *range(STEP, side, STEP)]


class Product(Solved):
    """W ≈ U·UᵀW, with U the leading eigenvectors of W C Wᵀ: the best of that rank for these inputs."""

    def __init__(self, matrix: Tensor, moment: Moment) -> None:
        self.left, energies = leading(matrix, moment)
        self.right = self.left.mT @ matrix
        self.lost = shares(energies)

    def errors(self) -> Iterator[tuple[Rank, float]]:
        return (((r,), self.lost[r]) for r in ranks_for(len(self.lost) - 1))

    def error(self, rank: Rank) -> float:
        return self.lost[rank[0]]

    def weights(self, rank: Rank) -> list[Tensor]:
        return list(balanced(self.right[: rank[0]], self.left[:, : rank[0]]))


def leading(matrix: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
    """Eigenvectors (rows, k) and eigenvalues of matrix · C · matrixᵀ, the largest first."""
    turn = None
    if matrix.shape[0] > matrix.shape[1]:
        turn, matrix = torch.linalg.qr(matrix)
    gram = moment.gram(matrix)
    energies, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    vectors = vectors.flip(-1)
    return vectors if turn is None else turn @ vectors, energies.flip(-1).clamp_min(0)


def shares(energies: Tensor) -> list[float]:
    """What the components from the k-th on hold of all, for k = 0 … their number."""
    rest = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    lost: list[float] = (rest / rest[0].clamp_min(torch.finfo(rest.dtype).tiny)).tolist()
    return lost


def balanced(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors whose components are as long in one as in the other, so that both train alike."""
    ratio = torch.linalg.vector_norm(last, dim=0) / torch.linalg.vector_norm(first, dim=1).clamp_min(1e-12)
    scale = torch.where(ratio > 1e6, 1, ratio).sqrt()  # a component that holds nothing stays as it is
    return first * scale[:, None], last / scale


class SVD(Form):
    """Two linear layers, or two 1×1 convolutions."""

    def fits(self, layer: Layer) -> bool:
        return isinstance(layer, nn.Linear) or prod(layer.kernel_size) == 1

    def full(self, layer: Layer) -> Rank:
        return (min(layer.weight.flatten(1).shape),)

    def parts(self, layer: Layer, rank: Rank) -> list[Part]:
        out, *rest = layer.weight.shape
        ones = (1,) * (len(rest) - 1)
        return [Part((rank[0], *rest), "outputs"), Part((out, rank[0], *ones), "outputs")]

    def modules(self, layer: Layer, rank: Rank) -> list[nn.Module]:
        if isinstance(layer, nn.Linear):
            made = {"device": layer.weight.device, "dtype": layer.weight.dtype}
            biased = layer.bias is not None
            return [
                nn.utils.skip_init(nn.Linear, layer.in_features, rank[0], bias=False, **made),
                nn.utils.skip_init(nn.Linear, rank[0], layer.out_features, bias=biased, **made),
            ]
        out, inner = layer.weight.shape[:2]
        return [
            _conv(layer, inner, rank[0], _options(layer)),
            _conv(layer, rank[0], out, {"kernel_size": 1}, last=True),
        ]

    def solve(self, layer: Layer, weight: Tensor, moment: Moment) -> Solved:
        return Product(weight.flatten(1), moment)


class Channel(SVD):
    """The kernel with fewer outputs, then 1×1."""

    def fits(self, layer: Layer) -> bool:
        return not isinstance(layer, nn.Linear) and prod(layer.kernel_size) > 1


class Spatial(Form):
    """k×1, then 1×k: a kernel of two dimensions by two of one."""

    whole = True

    def fits(self, layer: Layer) -> bool:
        return isinstance(layer, nn.Conv2d) and min(layer.kernel_size) > 1

    def full(self, layer: Layer) -> Rank:
        out, inner, high, wide = layer.weight.shape
        return (min(inner * high, out * wide),)

    def parts(self, layer: Layer, rank: Rank) -> list[Part]:
        out, inner, high, wide = layer.weight.shape
        return [Part((rank[0], inner, high, 1), "between"), Part((out, rank[0], 1, wide), "outputs")]

    def modules(self, layer: Layer, rank: Rank) -> list[nn.Module]:
        options = _options(layer)
        along = [{n: v if isinstance(v, str) else (v[0], z) for n, v, z in _each(options, 0)}]
        along += [{n: v if isinstance(v, str) else (z, v[1]) for n, v, z in _each(options, 1)}]
        return [
            _conv(layer, layer.weight.shape[1], rank[0], along[0]),
            _conv(layer, rank[0], layer.weight.shape[0], along[1], last=True),
        ]

    def solve(self, layer: Layer, weight: Tensor, moment: Moment) -> Solved:
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


class Tucker(Form):
    """1×1, the kernel between fewer channels, 1×1; ranks of the outputs and of the inputs."""

    whole = True

    def fits(self, layer: Layer) -> bool:
        return not isinstance(layer, nn.Linear) and prod(layer.kernel_size) > 1

    def full(self, layer: Layer) -> Rank:
        out, inner, *kernel = layer.weight.shape
        return min(out, inner * prod(kernel)), min(inner, out * prod(kernel))

    def parts(self, layer: Layer, rank: Rank) -> list[Part]:
        out, inner, *kernel = layer.weight.shape
        ones = (1,) * len(kernel)
        return [
            Part((rank[1], inner, *ones), "inputs"),
            Part((rank[0], rank[1], *kernel), "outputs"),
            Part((out, rank[0], *ones), "outputs"),
        ]

    def modules(self, layer: Layer, rank: Rank) -> list[nn.Module]:
        return [
            _conv(layer, layer.weight.shape[1], rank[1], {"kernel_size": 1}),
            _conv(layer, rank[1], rank[0], _options(layer)),
            _conv(layer, rank[0], layer.weight.shape[0], {"kernel_size": 1}, last=True),
        ]

    def solve(self, layer: Layer, weight: Tensor, moment: Moment) -> Solved:
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


FORMS: dict[str, Form] = {"svd": SVD(), "channel": Channel(), "spatial": Spatial(), "tucker": Tucker()}


def forms_of(layer: Layer, moment: Moment) -> dict[str, Form]:
    """The forms that a layer can be brought into, by name."""
    return {n: form for n, form in FORMS.items() if form.fits(layer) and (moment.whole or not form.whole)}


def _options(layer: Layer) -> dict[str, Any]:
    """How a convolution walks over its input."""
    return {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}


def _each(options: dict[str, Any], axis: int) -> Iterable[tuple[str, Any, int]]:
    """Options with what the other dimension has of each."""
    return ((name, value, 0 if name == "padding" else 1) for name, value in options.items())


def _conv(layer: Any, inner: int, out: int, options: dict[str, Any], last: bool = False) -> nn.Module:
    """A convolution of the layer's kind, without values."""
    if "padding" in options:
        options = {**options, "padding_mode": layer.padding_mode}
    base = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    return nn.utils.skip_init(
        base, inner, out, bias=last and layer.bias is not None,
        device=layer.weight.device, dtype=layer.weight.dtype, **options,
    )  # fmt: skip
