"""Rows: an adapter's numbers one behind the other in one tensor, so that a batch gathers them all at once.

Adapters of one plan have one layout. An adapter that is apart from its model owns its row, of which its
parameters are views; whoever holds the adapter computes with these numbers, and nobody keeps a list of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.update import LowRankUpdate

Updates = Mapping[LoRALayer, Mapping[str, LowRankUpdate]]  # by the layer, by the slot
Key = tuple[LoRALayer, str, str] | str  # layer, slot and leaf of an update's tensor, or a name of the model's
ALIGNED = 16  # numbers: a tensor begins at a multiple of them


def keyed(updates: Updates, values: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """All tensors of an adapter."""
    tensors: dict[Key, Tensor] = {
        (layer, slot, leaf): parameter
        for layer, slots in updates.items()
        for slot, update in slots.items()
        for leaf, parameter in update._parameters.items()
        if parameter is not None
    }
    tensors.update(values.items())
    return tensors


def is_plain(update: LowRankUpdate) -> bool:
    """Whether the update is s·B·A of the parameters themselves."""
    return type(update) is LowRankUpdate and not update.makes_factors


class Layout:
    """Where each tensor of an adapter stands in its row: of a plain update A and s·B. Tensors of another
    dtype or device than the first have no place there.

    Args:
        updates: of an adapter.
        values: of the model's own tensors that it trains, by name.

    Attributes:
        updates: those of one adapter, for what all of the plan have alike.
        values: names of the model's own tensors.
        size: numbers of a row.
    """

    def __init__(self, updates: Updates, values: Mapping[str, Tensor]) -> None:
        self.updates, self.values, self.size = updates, tuple(values), 0
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self._places: dict[Key, tuple[int, torch.Size, tuple[int, ...]]] = {}
        for key, tensor in keyed(updates, values).items():
            if not self._places:
                self.dtype, self.device = tensor.dtype, tensor.device
            if (tensor.dtype, tensor.device) == (self.dtype, self.device):
                strides = tuple(math.prod(tensor.shape[d + 1 :]) for d in range(tensor.dim()))
                self._places[key] = self.size, tensor.shape, strides
                self.size += -(-tensor.numel() // ALIGNED) * ALIGNED
        self._scalings = {
            (layer, slot): update.scaling
            for layer, slots in updates.items()
            for slot, update in slots.items()
            if is_plain(update) and (layer, slot, "lora_B") in self
        }

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def has_scaled(self, layer: LoRALayer, slot: str) -> bool:
        """Whether B has the scaling in it."""
        return (layer, slot) in self._scalings

    @torch.no_grad()
    def filled(self, tensors: Mapping[Key, Tensor]) -> tuple[Tensor, dict[Key, Tensor]]:
        """The row of an adapter, (size,), zeros where it has no such tensor; and its tensors, views of it."""
        row = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        views = {
            key: row.as_strided(shape, strides, start)
            for key, (start, shape, strides) in self._places.items()
            if key in tensors
        }
        for key, view in views.items():
            view.copy_(tensors[key])
        for (layer, slot), scaling in self._scalings.items():
            if (key := (layer, slot, "lora_B")) in views:
                views[key].mul_(scaling)
        return row, views

    def of(self, rows: Tensor, key: Key) -> Tensor:
        """A tensor of several adapters, a view of their rows: (n, size) -> (n, *shape)."""
        start, shape, strides = self._places[key]
        return rows.as_strided((len(rows), *shape), (self.size, *strides), rows.storage_offset() + start)
