"""Adapters apart from their model, which are put back into it at once: of thousands a model then holds those
that are at work. What is in files is read by `lora_lightning.files`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from lora_lightning.adapters.inject import apply_plan
from lora_lightning.adapters.rows import Key, Layout, Updates, keyed
from lora_lightning.adapters.state import Adapter, state_of
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import UserError
from lora_lightning.layers.layer import slot_key
from lora_lightning.layers.registry import LoRALayer, lora_layers
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.planning.plan import Plan


@dataclass(eq=False)
class Parked:
    """An adapter that was taken out of its model.

    Attributes:
        record: what the model's state had of it.
        updates: by the layer, by the slot.
        layout: of the row.
        row: its numbers, (layout.size,); updates and the record's values are views of it.
    """

    name: str
    record: Adapter
    updates: Updates
    layout: Layout
    row: Tensor

    def bytes(self) -> int:
        """Of its tensors."""
        tensors = keyed(self.updates, self.record.values).values()
        return sum(t.numel() * t.element_size() for t in tensors)


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
    known = cast("Updates", updates)
    parked = _parked(name, record, known, Layout(known, record.values), keyed(known, record.values))
    parked.layout.updates = parked.updates  # not those of before, which had memory of their own
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
    is looked at.

    Args:
        tensors: of the updates, under `LayerPlan.tensor`'s names, in the shapes of the other's.
        values: of what it trains of the model's own.
    """
    places = {(p.module, slot_key(p.slot)): p for p in other.record.plan.layers}
    named: dict[Key, Tensor] = {
        (layer, slot, leaf): tensors[places[layer.lora_path, slot].tensor(leaf)].to(parameter)
        for layer, slots in other.updates.items()
        for slot, update in slots.items()
        for leaf, parameter in update._parameters.items()
        if parameter is not None
    }
    return _parked(
        name, other.record, other.updates, other.layout, {**named, **dict[Key, Tensor](values.items())}
    )


def _parked(
    name: str, record: Adapter, like: Updates, layout: Layout, tensors: Mapping[Key, Tensor]
) -> Parked:
    """An adapter with updates like these, of these numbers, which are copied into a row."""
    row, views = layout.filled(tensors)
    own = {**tensors, **views}
    updates = {
        layer: {slot: _with(update, (layer, slot), layout, own) for slot, update in slots.items()}
        for layer, slots in like.items()
    }
    values = {n: own[n] for n in record.values}
    return Parked(name, replace(record, values=values), updates, layout, row)


def _with(
    update: LowRankUpdate, place: tuple[LoRALayer, str], layout: Layout, tensors: Mapping[Key, Tensor]
) -> LowRankUpdate:
    """The same update of other numbers, its scaling in B where the row has it so. What torch keeps of a
    module's hooks, 3 kB of empty mappings, is the other's: nobody hooks an update."""
    made = object.__new__(type(update))
    made.__dict__.update(update.__dict__)
    if layout.has_scaled(*place):
        made.__dict__["scaling"] = 1.0
    made.__dict__["_parameters"] = {
        leaf: p if p is None else nn.Parameter(tensors[(*place, leaf)], requires_grad=False)
        for leaf, p in update._parameters.items()
    }
    return made
