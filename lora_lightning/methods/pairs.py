"""Pairs: the two trained factors of each update in a model, ours and PEFT's, for optimizers that treat them
by their parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lora_lightning.layers.registry import lora_layers, update_ids
from lora_lightning.utils.names import by_class, named_modules

PEFT = {("peft.tuners.lora.layer", "LoraLayer"): True}


@dataclass(frozen=True, eq=False)
class Pair:
    """A and B of one update B·A, or of one for each group.

    Attributes:
        A: (groups·r, in / groups, *kernel).
        B: (out, r), or of a transposed slot (groups·r, out / groups, *kernel).
        looked_up: a column of A is picked by an index, as of embeddings, and no input multiplied by A.
    """

    A: nn.Parameter
    B: nn.Parameter
    groups: int = 1
    transposed: bool = False
    looked_up: bool = False

    def rows(self, tensor: Tensor, of: nn.Parameter) -> Tensor:
        """A tensor of the shape of one of the factors, with the rank's dimension in the middle:
        (groups, r, columns)."""
        if of is self.B and not self.transposed:
            return tensor.reshape(self.groups, len(tensor) // self.groups, -1).mT
        return tensor.reshape(self.groups, len(tensor) // self.groups, -1)

    def unrolled(self, rows: Tensor, of: nn.Parameter) -> Tensor:
        """The inverse of `rows`."""
        return (rows.mT if of is self.B and not self.transposed else rows).reshape(of.shape)


def pairs_of(model: nn.Module) -> list[Pair]:
    """The factors of every update in the model, of adapters that are not selected too, layer by layer."""
    ours = [
        Pair(update.lora_A, update.lora_B, slot.groups, slot.transposed, looked_up=slot.zero == "A")
        for layer in lora_layers(model).values()
        for adapter in layer.lora
        for update in layer.updates(adapter)
        for slot in (update.slot,)
    ]
    return [*ours, *(pair for layer in _peft_layers(model) for pair in _pefts(layer))]


def factor_ids(model: nn.Module) -> set[int]:
    """Identities of the parameters of every update in the model: A, B and DoRA's magnitudes."""
    theirs = {
        id(parameter)
        for layer in _peft_layers(model)
        for name in layer.adapter_layer_names
        for parameter in getattr(layer, name).parameters()
    }
    return update_ids(model) | theirs


def _peft_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in named_modules(model).values() if by_class(module, PEFT))


def _pefts(layer: Any) -> Iterator[Pair]:
    """PEFT keeps the groups of a convolution in B's: (out, r / groups, 1, 1) for A's r rows of all groups."""
    for adapter, A in layer.lora_A.items():
        groups = cast(int, getattr(layer.lora_B[adapter], "groups", 1))
        yield Pair(A.weight, layer.lora_B[adapter].weight, groups)
    for adapter, A in layer.lora_embedding_A.items():
        yield Pair(A, layer.lora_embedding_B[adapter], looked_up=True)
