"""Held: a matrix that is read and not called, as attention does with its projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


@dataclass(frozen=True, eq=False)
class Held:
    """A matrix (out, in) that is multiplied with by reading it.

    Attributes:
        module: that holds it.
        name: of that module in the model.
        slot: of the matrix there, "" of a linear layer.
        parameter: its name there.
    """

    module: nn.Module
    name: str
    slot: str
    parameter: str
    bias: None = None  # stays where it is

    @property
    def weight(self) -> Tensor:
        """The matrix."""
        return cast(Tensor, self.module._parameters[self.parameter])

    @property
    def training(self) -> bool:
        """The mode of its module."""
        return self.module.training


def hold(held: Held, factors: nn.Sequential) -> None:
    """Let the product of two linear layers take the place of a matrix.

    Afterwards `parametrizations.NAME.original` is (out, r), and `parametrizations.NAME.0` a linear layer
    from r to in, whose product with it is what reading NAME gives.
    """
    first, last = cast(nn.Linear, factors[0]), cast(nn.Linear, factors[1])
    turn = nn.Linear(first.out_features, first.in_features, bias=False, device="meta")
    turn.weight = nn.Parameter(first.weight.detach().mT.contiguous(), first.weight.requires_grad)
    held.module._parameters[held.parameter] = cast(nn.Parameter, last.weight)
    register_parametrization(held.module, held.parameter, turn, unsafe=True)
