"""What files keep of an adapted model: trained tensors, an adapter, a checkpoint's entry. No file is made."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.base_values import begin_updates, refuse_replaced
from lora_lightning.adapters.state import (
    extra_tensors,
    state_of,
    update_of,
)
from lora_lightning.files.alignment import network_of
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.frozen_base import FrozenBase, frozen_base
from lora_lightning.layers.registry import lora_layers, update_ids
from lora_lightning.layers.swap import plain_class
from lora_lightning.utils.names import joined, named_parameters, submodule


def trained_tensors(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The tensors that training can change, under their names in `model.state_dict()`: the adapter's
    updates with what never trains of them, its heads, other trainable parameters, and the running statistics
    that are not frozen.

    Args:
        adapter: None is the first selected one. Of another the values stand in the record on the model.
    """
    state = state_of(model)
    adapter = state.adapter if adapter is None else adapter
    record = state.named(adapter)
    kept: dict[str, Tensor] = {}
    for path, layer in lora_layers(model).items():
        if adapter in layer.lora:
            kept.update(layer.lora[adapter].named_parameters(prefix=joined(path, f"lora.{adapter}")))
    own = extra_tensors(model, record.extra_trainables)
    if adapter == state.adapter:
        named, updates = named_parameters(model), update_ids(model)
        trains = {n: p for n, p in named.items() if p.requires_grad and id(p) not in updates}
        kept.update({**trains, **own})
    else:
        kept.update({n: record.values.get(n, t) for n, t in own.items()})
    return {n: t.detach() for n, t in kept.items()}


def lora_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """What `save_adapter` writes: `trained_tensors` without the adapter's name in the keys, so that
    `blocks.0.attn.qkv.lora.default.weight.lora_A` becomes `blocks.0.attn.qkv.lora_A`.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        adapter: None is the first selected one.

    Raises:
        UserError: the model is not adapted, or has no adapter of this name.
    """
    state = state_of(model)
    adapter = state.adapter if adapter is None else adapter
    names = {p.update(adapter): p.name for p in state.named(adapter).plan.layers}
    stored = {}
    for name, tensor in trained_tensors(model, adapter).items():
        update, _, leaf = name.rpartition(".")
        stored[joined(names.get(update, update), leaf)] = tensor
    return stored


def saved_adapter(
    model: nn.Module, adapter: str | None = None, base: FrozenBase | None = None
) -> SavedAdapter:
    """An adapter of the model as it would be written; its tensors are the model's own.

    Args:
        adapter: None is the first selected one.
        base: what is known of the base already; None looks at it.

    Raises:
        UserError: the model is not adapted, or has no adapter of this name.
    """
    state = state_of(model)
    name = state.adapter if adapter is None else adapter
    record = state.named(name)
    refuse_replaced(model)
    begin_updates(model)
    slots = {layer.name: update_of(model, layer, name).slot for layer in record.plan.layers}
    base = frozen_base(model) if base is None else base
    base_class = plain_class(submodule(model, network_of(model, record.plan)))
    return SavedAdapter(
        record.config,
        record.plan,
        lora_state_dict(model, name),
        slots,
        base_class.__name__,
        base.fingerprint,
        base.quantized,
        _training(model),
    )


def checkpoint_entry(model: nn.Module, base: FrozenBase | None = None) -> dict[str, Any]:
    """What a Trainer's checkpoint says of the adapters whose updates stand in its state_dict. There the
    heads and norms have the values of the first selected one; those of the others are in the entry.

    Args:
        base: what is known of the base already; None looks at it.
    """
    state = state_of(model)
    base = frozen_base(model) if base is None else base
    adapters, about = {}, {}
    for name in sorted(state.adapters, key=lambda n: n == state.adapter):
        saved = saved_adapter(model, name, base)
        about = saved.description()
        parts = {key: about.pop(key) for key in ("config", "plan", "slots")}
        updates = saved.update_names()
        own = [n for n in saved.tensors if n not in updates]
        values = {} if name == state.adapter else {n: saved.tensors[n] for n in own}
        adapters[name] = {**parts, "extra_trainables": own, "values": values}
    return {
        **about,
        "network": network_of(model, state.plan),
        "active": list(state.active),
        "adapters": {name: adapters[name] for name in state.adapters},
    }


def _training(model: nn.Module) -> dict[str, Any]:
    """Epochs and steps, where a Trainer knows them or a checkpoint told them."""
    trainer = getattr(model, "_trainer", None)
    if trainer is None or not trainer.global_step:
        return model.__dict__.get("lora_trained", {})
    loop = trainer.fit_loop
    epochs, last = loop.epoch_progress.current, loop.epoch_loop.batch_progress.is_last_batch
    return {"epochs": epochs.ready if last else epochs.processed, "steps": trainer.global_step}
