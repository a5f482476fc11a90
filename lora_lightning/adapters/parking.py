"""Adapters apart from their model, which are put back into it at once: of thousands a model then holds those
that are at work. What is in files is read by `lora_lightning.files`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from lora_lightning.adapters.inject import apply_plan
from lora_lightning.adapters.state import Adapter, state_of
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import UserError
from lora_lightning.layers.layer import slot_key
from lora_lightning.layers.registry import LoRALayer, lora_layers
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.planning.plan import LayerPlan, Plan


@dataclass
class Parked:
    """An adapter that was taken out of its model.

    Attributes:
        record: what the model's state had of it.
        updates: by the layer, by the slot.
    """

    name: str
    record: Adapter
    updates: dict[LoRALayer, dict[str, LowRankUpdate]]

    def bytes(self) -> int:
        """Of its tensors."""
        tensors = [p for slots in self.updates.values() for u in slots.values() for p in u.parameters()]
        return sum(t.numel() * t.element_size() for t in (*tensors, *self.record.values.values()))


def hold_nothing(model: nn.Module, config: LoRAConfig, planned: Plan, name: str) -> None:
    """Adapt a plain model with an adapter that changes nothing and stays selected, so that all others can be
    taken out of it and put back: the model as it stands is the base.

    Args:
        config: of an adapter that will be put in; decides which norms are frozen.
        planned: of that adapter, whose backbone all others have.
        name: of the one that changes nothing.
    """
    nothing = replace(planned, layers=[], heads=[])
    apply_plan(model, replace(config, train_bias="none", train_norm="frozen"), nothing, name, begins=False)


def park(model: nn.Module, name: str) -> Parked:
    """Take an adapter that is not selected out of the model, with all its values. The layers stay adapted.

    Raises:
        UserError: there is no such adapter, it is selected, or somebody is within a context of the model.
    """
    state = state_of(model)
    record = state.named(name)
    if name in state.active:
        raise UserError(f"adapter {name!r} is selected and cannot be taken out: select another one first.")
    layers = [layer for layer in lora_layers(model).values() if name in layer.lora]
    updates = {layer: dict(cast(nn.ModuleDict, layer.lora[name]).items()) for layer in layers}
    parked = Parked(name, record, cast("dict[LoRALayer, dict[str, LowRankUpdate]]", updates))
    take_out(model, parked)
    return parked


def take_out(model: nn.Module, parked: Parked) -> None:
    """Take an adapter out again that `put_back` has put in.

    Raises:
        UserError: somebody is within a context of the model.
    """
    state = state_of(model)
    with state.changing():
        for layer in parked.updates:
            del layer.lora._modules[parked.name]
        del state.adapters[parked.name]


def put_back(model: nn.Module, parked: Parked) -> None:
    """Put an adapter back into the model that it was taken out of; it is not selected.

    Raises:
        UserError: the model has an adapter of this name, or somebody is within a context of it.
    """
    state = state_of(model)
    if parked.name in state.adapters:
        raise UserError(f"the model has an adapter {parked.name!r} already: delete it first.")
    with state.changing():
        for layer, slots in parked.updates.items():
            layer.lora._modules[parked.name] = _place_of(slots, layer.training)
        state.adapters[parked.name] = parked.record


def _place_of(slots: Mapping[str, LowRankUpdate], training: bool) -> nn.ModuleDict:
    """A layer's place of one adapter, made without what `__init__` and `add_module` do, which takes ten times
    as long; what torch keeps of hooks is that of all such places: nobody hooks one."""
    place = object.__new__(nn.ModuleDict)
    place.__dict__.update(_BARE)
    place.__dict__.update(_modules=dict(slots), training=training)
    return place


_BARE = nn.ModuleDict().__dict__


def parked_like(
    other: Parked, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Parked:
    """An adapter of the very plan and configuration of one that was taken out, with other numbers: no model
    is looked at, and the tensors are not copied where they have the type that is wanted.

    Args:
        tensors: of the updates, under `LayerPlan.tensor`'s names, in the shapes of the other's.
        values: of what it trains of the model's own.
    """
    places = {(p.module, slot_key(p.slot)): p for p in other.record.plan.layers}
    updates = {
        layer: {key: _with(update, places[layer.lora_path, key], tensors) for key, update in slots.items()}
        for layer, slots in other.updates.items()
    }
    return Parked(name, replace(other.record, values=dict(values)), updates)


def _with(update: LowRankUpdate, planned: LayerPlan, tensors: Mapping[str, Tensor]) -> LowRankUpdate:
    """The same update of other numbers. What torch keeps of a module's hooks, 3 kB of empty mappings, is the
    other's: nobody hooks an update."""
    made = object.__new__(type(update))
    made.__dict__.update(update.__dict__)
    made.__dict__["_parameters"] = {
        leaf: p if p is None else nn.Parameter(tensors[planned.tensor(leaf)].to(p), requires_grad=False)
        for leaf, p in update._parameters.items()
    }
    return made
