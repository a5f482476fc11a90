"""Adapters to folders and back: what is kept of an adapted model, written whole, checked before it is
loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.adapters.base_values import refuse_meta
from lora_lightning.adapters.inject import apply_plan, attach_adapter, extra_names, refuse_merged, replace
from lora_lightning.adapters.state import (
    Adapter,
    forget_kept,
    is_injected,
    state_of,
    viewed_as_plain,
)
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError, did_you_mean
from lora_lightning.files.compatibility import check_fit, fitted, not_finite, refuse
from lora_lightning.files.fingerprint import frozen_tensors
from lora_lightning.files.format import SavedAdapter, write_adapter
from lora_lightning.files.from_model import lora_state_dict, saved_adapter
from lora_lightning.files.locate import read_any
from lora_lightning.files.origin import Origin
from lora_lightning.files.pair import write_pair
from lora_lightning.files.peft_write import to_peft
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.planning.plan import Plan
from lora_lightning.utils.sharding import FIRST, gathered, is_flattened, is_sharded, refuse_sharded
from lora_lightning.utils.tables import truncate_list

FORMATS = ("lora_lightning", "peft")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter: str | None = None,
    format: str = "lora_lightning",
    origin: Origin | Mapping[str, Any] | None = None,
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
        origin: what travels with the adapter: a mapping with `facts`, plain values such as
            `{"class_names": ["cat", "dog"]}`; the application adds `config` and `recipe`, by which
            `lora-lightning predict` needs nothing else.

    Returns:
        The folder.

    Raises:
        UserError: the model is not adapted, has no adapter of this name, FSDP has flattened it, or an
            trained tensor holds NaN or infinity.
        ConfigError: another format, or "peft" and what PEFT cannot express, every layer named; or `origin`
            holds more than plain values.
        OSError: the folder cannot be written; files that stood there before are untouched.
    """
    if format not in FORMATS:
        near = did_you_mean(format, FORMATS)
        raise ConfigError([f"format={format!r}: give one of {', '.join(FORMATS)}.{near}"])
    state_of(model).require_no_context()
    if is_flattened(model):
        refuse_sharded(model, "save_adapter", "Take it from a checkpoint: docs/distributed.md shows how.")
    refuse_meta(model, "save_adapter")
    saved = dataclasses.replace(saved_adapter(model, adapter), origin=Origin.of(origin))
    if is_sharded(model):
        saved = dataclasses.replace(saved, tensors=gathered(saved.tensors))
        if torch.distributed.get_rank() != 0:
            return Path(folder)
    if broken := not_finite(saved.tensors):
        raise UserError(
            f"{truncate_list(broken)}: the training diverged, and such an adapter cannot be loaded. "
            "Nothing was written. Save one of before that."
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
        model: any module, adapted or not.
        folder: with the adapter's files.
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
    if is_injected(model):
        refuse_merged(model)
    load_saved(model, read_any(folder), folder, adapter, check_base)


def load_saved(
    model: nn.Module,
    saved: SavedAdapter,
    folder: str | os.PathLike[str],
    adapter: str | None = None,
    check_base: bool = True,
) -> None:
    """`load_adapter` of what was read already.

    Args:
        saved: as `read_any` gives it.
        folder: where it was read, for errors.

    Raises:
        as `load_adapter`.
    """
    fresh = not is_injected(model)
    name = adapter or ("default" if fresh else state_of(model).adapter)
    record = None if fresh else state_of(model).adapters.get(name)
    with viewed_as_plain(model):
        saved = fitted(saved, model, folder)
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
        apply_plan(model, saved.config, saved.plan, name, begins=False)
    elif not stays:
        (replace if record else attach_adapter)(model, saved.config, saved.plan, name, begins=False)
    targets = lora_state_dict(model, name)
    with torch.no_grad():
        for key, tensor in saved.tensors.items():
            targets[key].copy_(tensor)
    forget_kept(model)
    state_of(model).begun = True


def _warn_of_floats(model: nn.Module, saved: SavedAdapter, folder: str | os.PathLike[str]) -> None:
    here = frozen_tensors(model)
    kinds = {k for n, k in saved.quantized.items() if n in here and not isinstance(here[n], QuantizedTensor)}
    for kind in kinds:
        rank_zero_warn(
            f"the adapter in {folder} was trained on weights in {kind}, which are floats here: its "
            f"outputs are not those of the training. Call lora_lightning.quantize(model, {kind!r}) first."
        )


def _differences(record: Adapter, config: LoRAConfig, planned: Plan) -> list[str]:
    """Why an adapter of the model cannot take the values of one with this configuration and plan."""
    here = {p.name: p for p in record.plan.layers}
    there = {p.name: p for p in planned.layers}
    problems = [f"{n} is not adapted in the file" for n in here if n not in there]
    problems += [f"{n} is not adapted in the model" for n in there if n not in here]
    for name in here.keys() & there.keys():
        for option in ("rank", "alpha", "fixed", "mixed"):
            ours, theirs = getattr(here[name], option), getattr(there[name], option)
            if ours != theirs:
                what = "rank of what never trains" if option == "fixed" else option
                problems.append(f"{name}: {what} {ours} in the model, {theirs} in the file")
    for option in ("use_rslora", "use_dora"):
        ours, theirs = getattr(record.config, option), getattr(config, option)
        if ours != theirs:
            problems.append(f"{option}: {ours} in the model, {theirs} in the file")
    return sorted(problems)
