"""Adapters to folders and back: what is kept of an adapted model, written whole, checked before it is
loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.adapters.base_values import begin_magnitudes, refuse_meta, refuse_replaced
from lora_lightning.adapters.inject import apply_plan, attach_adapter, extra_names, refuse_merged, replace
from lora_lightning.adapters.state import (
    Adapter,
    extra_tensors,
    is_injected,
    state_of,
    update_of,
    viewed_as_plain,
)
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError, did_you_mean
from lora_lightning.files.compatibility import check_fit, fitted, network_of, not_finite, refuse
from lora_lightning.files.fingerprint import frozen_tensors
from lora_lightning.files.format import SavedAdapter, write_adapter
from lora_lightning.files.frozen_base import FrozenBase, frozen_base
from lora_lightning.files.locate import read_any
from lora_lightning.files.pair import write_pair
from lora_lightning.files.peft_write import to_peft
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.layers.registry import lora_layers, update_ids
from lora_lightning.layers.swap import plain_class
from lora_lightning.planning.plan import Plan
from lora_lightning.utils.names import joined, named_parameters, submodule
from lora_lightning.utils.sharding import FIRST, gathered, is_flattened, is_sharded, refuse_sharded
from lora_lightning.utils.tables import truncate_list

FORMATS = ("lora_lightning", "peft")


def trained_tensors(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The tensors that training can change, under their names in `model.state_dict()`: the adapter's
    updates, its heads, other trainable parameters, and the running statistics that are not frozen.

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
    begin_magnitudes(model)
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


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter: str | None = None,
    format: str = "lora_lightning",
) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`, both complete before either takes its
    place.

    Where FSDP2 has sharded the model, every process must call this, and the first one writes.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        folder: made when it does not exist.
        adapter: None is the first selected one.
        format: "lora_lightning", or "peft" for `peft.PeftModel.from_pretrained(base, folder)`, where the
            base of a LightningModule is the network in it.

    Returns:
        The folder.

    Raises:
        UserError: the model is not adapted, has no adapter of this name, FSDP has flattened it, or an
            trained tensor holds NaN or infinity.
        ConfigError: another format, or "peft" and what PEFT cannot express, every layer named.
        OSError: the folder cannot be written; files that stood there before are untouched.
    """
    if format not in FORMATS:
        near = did_you_mean(format, FORMATS)
        raise ConfigError([f"format={format!r}: give one of {', '.join(FORMATS)}.{near}"])
    state_of(model).require_no_context()
    if is_flattened(model):
        refuse_sharded(model, "save_adapter", "Take it from a checkpoint: docs/distributed.md shows how.")
    refuse_meta(model, "save_adapter")
    saved = saved_adapter(model, adapter)
    if is_sharded(model):
        saved = dataclasses.replace(saved, tensors=gathered(saved.tensors))
        if torch.distributed.get_rank() != 0:
            return Path(folder)
    if broken := not_finite(saved.tensors):
        raise UserError(
            f"{truncate_list(broken)}: the training diverged, and such an adapter cannot be loaded. "
            "Nothing was written."
        )
    if format == "peft":
        with viewed_as_plain(model):
            about, tensors, metadata = to_peft(saved, model)
        write_pair(folder, json.dumps(about, indent=2) + "\n", tensors, metadata)
    else:
        write_adapter(folder, saved)
    return Path(folder)


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter: str | None = None, check_base: bool = True
) -> None:
    """Load what `save_adapter` or PEFT wrote. A model that is not adapted yet is adapted as the file says.

    An adapter saved from a LightningModule that holds the network as `self.model` loads into the bare
    network as well, and the other way round.

    Args:
        adapter: name under which it is loaded. An adapter of this name takes the values where its
            layers, ranks and scaling are those of the file (nothing is rebuilt or compiled anew), and is
            replaced where they are not; otherwise one is added, not selected. None is the first selected
            adapter, which is never replaced.
        check_base: refuse a base whose frozen weights have other values than the one it was trained on.

    Raises:
        AdapterFileError: the files are missing, damaged, foreign or made for another model or base. All
            is checked before the model is touched.
        ConfigError: the name is no identifier.
        UserError: the model is merged, sharded, or within `adapters_off` or `mixed_adapters`.
    """
    refuse_sharded(model, "load_adapter", FIRST)
    fresh = not is_injected(model)
    if not fresh:
        refuse_merged(model)
    name = adapter or ("default" if fresh else state_of(model).adapter)
    record = None if fresh else state_of(model).adapters.get(name)
    with viewed_as_plain(model):
        saved = fitted(read_any(folder), model, folder)
        own = extra_names(model, saved.config, saved.plan)
    differences = _differences(record, saved.config, saved.plan) if record else []
    if adapter is None:
        refuse(differences, folder)
    stays = (
        record is not None and not differences and (adapter is None or {*own} == {*record.extra_trainables})
    )
    check_fit(model, saved, folder, check_base, lora_state_dict(model, name) if stays else None)
    _warn_of_floats(model, saved, folder)
    if fresh:
        apply_plan(model, saved.config, saved.plan, name)
    elif not stays:
        (replace if record else attach_adapter)(model, saved.config, saved.plan, name)
    targets = lora_state_dict(model, name)
    with torch.no_grad():
        for key, tensor in saved.tensors.items():
            targets[key].copy_(tensor)
    state_of(model).begun = True


def _warn_of_floats(model: nn.Module, saved: SavedAdapter, folder: str | os.PathLike[str]) -> None:
    here = frozen_tensors(model)
    kinds = {k for n, k in saved.quantized.items() if n in here and not isinstance(here[n], QuantizedTensor)}
    for kind in kinds:
        rank_zero_warn(
            f"the adapter in {folder} was trained on weights in {kind}, which are floats here: its "
            f"outputs are not those of the training. Call lora_lightning.quantize(model, {kind!r}) first."
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


def _differences(record: Adapter, config: LoRAConfig, planned: Plan) -> list[str]:
    """Why an adapter of the model cannot take the values of one with this configuration and plan."""
    here = {p.name: p for p in record.plan.layers}
    there = {p.name: p for p in planned.layers}
    problems = [f"{n} is not adapted in the file" for n in here if n not in there]
    problems += [f"{n} is not adapted in the model" for n in there if n not in here]
    for name in here.keys() & there.keys():
        for option in ("rank", "alpha"):
            ours, theirs = getattr(here[name], option), getattr(there[name], option)
            if ours != theirs:
                problems.append(f"{name}: {option} {ours} in the model, {theirs} in the file")
    for option in ("use_rslora", "use_dora"):
        ours, theirs = getattr(record.config, option), getattr(config, option)
        if ours != theirs:
            problems.append(f"{option}: {ours} in the model, {theirs} in the file")
    return sorted(problems)


def _training(model: nn.Module) -> dict[str, Any]:
    """Epochs and steps, where a Trainer knows them or a checkpoint told them."""
    trainer = getattr(model, "_trainer", None)
    if trainer is None or not trainer.global_step:
        return model.__dict__.get("lora_trained", {})
    loop = trainer.fit_loop
    epochs, last = loop.epoch_progress.current, loop.epoch_loop.batch_progress.is_last_batch
    return {"epochs": epochs.ready if last else epochs.processed, "steps": trainer.global_step}
