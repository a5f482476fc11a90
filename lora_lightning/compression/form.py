"""What a form is: how a layer becomes a chain of smaller ones, at which ranks, with which values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from lora_lightning.compression.held import Held
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.positions import Positions

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding | Held
Rank = tuple[int, ...]
STEP = 16  # ranks that oneDNN's convolutions like
MATRIX_STEP = 8  # matrix products like these as well
SMALL = (4, 8)  # ranks below
ALL = 64  # sides below it may have every rank


def kind_of(layer: Layer) -> str:
    """The class of a layer, or of what holds it."""
    return type(layer.module if isinstance(layer, Held) else layer).__name__


@dataclass(frozen=True)
class Part:
    """One of the layers that take the place of another.

    Attributes:
        shape: of its weight.
        place: where its outputs lie: at the "inputs" or "outputs" of the layer, or "between";
            "looked up" where nothing is multiplied.
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
        parameters_alone: why it saves no FLOPs; "" of one that does.
    """

    whole = False
    parameters_alone = ""

    @abstractmethod
    def fits(self, layer: Layer) -> bool:
        """Whether such a layer can be brought into this form."""

    @abstractmethod
    def full(self, layer: Layer) -> Rank:
        """The ranks at which nothing is lost."""

    @abstractmethod
    def parts(self, layer: Layer, rank: Rank) -> list[Part]:
        """What the layer becomes."""

    def flops(self, layer: Layer, rank: Rank, where: Positions, batches: int) -> int:
        """Of the parts, in all batches."""
        return sum(where.flops(part.size, part.place) for part in self.parts(layer, rank))

    @abstractmethod
    def modules(self, layer: Layer, rank: Rank) -> list[nn.Module]:
        """The parts as plain modules without values, on the layer's device, in its dtype; the last one has
        the layer's bias."""

    @abstractmethod
    def solve(self, layer: Layer, weight: Tensor, moment: Moment) -> Solved:
        """Take a weight apart, in float64."""


def ranks_for(side: int, step: int = STEP) -> list[int]:
    """The ranks below a side that are tried: all of a small one, else multiples of a step."""
    if side < ALL:
        return list(range(1, side))
    return [r for r in SMALL if r < step] + list(range(step, side, step))
