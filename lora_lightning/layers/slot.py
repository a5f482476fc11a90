"""Slot: the place of one update in a module: which parameter, which of its rows, how it factorizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


@dataclass(frozen=True)
class Slot:
    """One weight, or some rows of one, that can have an update.

    Attributes:
        parameter: name of the module's parameter W.
        out_range: first and last+1 of W's first dimension; None is all of them.
        groups: of a convolution; each group has factors of its own.
        transposed: W is (in, out / groups, *kernel), as of transposed convolutions and embeddings.
        zero: which of "A" and "B" begins at zero.
        part: a part of another slot of the module, adapted only when it is named.
    """

    parameter: str
    out_range: tuple[int, int] | None = None
    groups: int = 1
    transposed: bool = False
    zero: str = "B"
    part: bool = False

    def of(self, weight: Tensor) -> Tensor:
        """The rows of W that this slot means."""
        return weight if self.out_range is None else weight[slice(*self.out_range)]

    def shape(self, weight: Tensor) -> tuple[int, ...]:
        """Shape of those rows."""
        out_range = weight.shape[0] if self.out_range is None else self.out_range[1] - self.out_range[0]
        return (out_range, *weight.shape[1:])

    def factors(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B: (groups·r, in / groups, *kernel) and (out, r); transposed,
        (groups·r, in / groups) and (groups·r, out / groups, *kernel)."""
        if self.transposed:
            return (self.groups * rank, shape[0] // self.groups), (self.groups * rank, *shape[1:])
        return (self.groups * rank, *shape[1:]), (shape[0], rank)

    def highest_rank(self, shape: tuple[int, ...]) -> int:
        """The smaller side of the matrix of one group."""
        columns = 1
        for size in shape[1:]:
            columns *= size
        return min(shape[0] // self.groups, columns)


def read_weight(module: nn.Module, name: str) -> Tensor:
    """The parameter `name`, or what its parametrization makes of it.

    In train mode torch's spectral norm takes a step of its iteration whenever the weight is read, and
    so changes the model; here it does not.
    """
    if not is_parametrized(module, name):
        return cast(Tensor, module._parameters[name])
    parametrization = cast(nn.ModuleDict, module.parametrizations)[name]
    modes = {part: part.training for part in parametrization.modules()}
    parametrization.eval()
    weight: Tensor = getattr(module, name)
    for part, mode in modes.items():
        part.training = mode
    return weight
