"""What a Trainer's checkpoint says of the adapter in it, and a LightningModule made from one.

Written by the LightningModule's own hooks, which Lightning calls in every mode of saving; those of the
callbacks it leaves out with `save_weights_only=True`.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lora_lightning.adapters.eject import eject
from lora_lightning.adapters.inject import activate, apply_plan, attach_adapter
from lora_lightning.adapters.state import ADVICE, is_injected, state_of
from lora_lightning.errors import AdapterFileError
from lora_lightning.files.checkpoint_digests import KEY, add_digests
from lora_lightning.files.checkpoint_read import adapters_in, read_checkpoint, require_adapter
from lora_lightning.files.compatibility import check_plan
from lora_lightning.files.fingerprint import fingerprint_of, refusal_of_base
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.from_model import checkpoint_entry
from lora_lightning.files.frozen_base import KnownBase
from lora_lightning.layers.registry import lora_layers
from lora_lightning.trainer.averaging import average_the_adapted
from lora_lightning.trainer.hparams import refuse_calls
from lora_lightning.trainer.state_dict import keep_trained_only
from lora_lightning.utils.torch_file import torch_reasons

GIVE = "Give a checkpoint that a Trainer with LoRACallback wrote."
Module = TypeVar("Module", bound=nn.Module)


def describe_checkpoints(module: Any, guarded: bool, check_base: bool = True) -> None:
    """From now on the module's checkpoints say which adapter they hold, and loading one gives the module
    the adapter that was saved, before its weights are restored.

    Args:
        guarded: write checkpoints that a module without LoRA refuses, see `add_tripwire`; not where weights
            will be sharded, and the base is known by its values of now.
        check_base: refuse checkpoints of a run with other frozen weights.
    """
    base = KnownBase(module, fixed=not guarded)
    module.on_save_checkpoint = partial(write_entry, module, guarded, base)
    module.on_load_checkpoint = partial(restore_entry, module, check_base, base)


def load_from_checkpoint(
    module_class: type[Module],
    path: str | os.PathLike[str],
    *,
    map_location: Any = "cpu",
    weights_only: bool = True,
    check_base: bool = True,
    **options: Any,
) -> Module:
    """`module_class.load_from_checkpoint` for a checkpoint that LoRACallback made small: the module is
    built, which gives it its base weights, adapted as the checkpoint says, and given what was trained.

    Args:
        module_class: the LightningModule's class.
        path: a checkpoint of a Trainer with LoRACallback, in any mode of saving.
        map_location: the device, or a mapping of devices, as in `torch.load`.
        weights_only: false runs code that the file may hold: for hyperparameters that are not plain
            values, from a file that you trust.
        check_base: refuse a module whose frozen weights have other values than those that it was trained on.
        **options: arguments of `module_class`, over those that the checkpoint holds.

    Raises:
        AdapterFileError: the file cannot be read or is damaged, holds no adapter, or one that does not fit
            the module or its base; or a hyperparameter names what is to be called.
    """
    checkpoint = read_checkpoint(path, GIVE, map_location=map_location, weights_only=weights_only)
    require_adapter(checkpoint, path, f"Use {module_class.__name__}.load_from_checkpoint(path).")
    if weights_only:
        options |= refuse_calls(checkpoint, path, options)
    saved, active = adapters_in(checkpoint, str(path))
    # Lightning builds the module by the stored hyperparameters; its weights come after the injection.
    building = type(module_class.__name__, (module_class,), {"load_state_dict": _load_nothing})
    build: Any = building
    module = build.load_from_checkpoint(path, map_location=map_location, weights_only=weights_only, **options)
    module.__class__ = module_class
    try:
        for one in saved.values():
            check_plan(module, one, path)
    except AdapterFileError as error:
        raise AdapterFileError(
            f"{error} Build all layers in __init__ or configure_model; Lightning does not call setup here."
        ) from None
    _make(module, saved, active)
    if check_base:
        _check_base(fingerprint_of(module), checkpoint, str(path))
    _give_values(module, checkpoint)
    keep_trained_only(module)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reasons = " ".join(torch_reasons(error))
        raise AdapterFileError(
            f"{path} does not fit {module_class.__name__}: {reasons}. Build it as it was when this was saved."
        ) from None
    module.__dict__["lora_trained"] = checkpoint[KEY].get("training", {})
    return module


def _load_nothing(self: nn.Module, *args: Any, **options: Any) -> Any:
    return _IncompatibleKeys([], [])


def write_entry(module: Any, guarded: bool, base: KnownBase, checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint which adapters it holds, on which base.

    Args:
        guarded: as in `describe_checkpoints`.
        base: of the module.
    """
    type(module).on_save_checkpoint(module, checkpoint)
    if not is_injected(module):
        return
    checkpoint[KEY] = {**checkpoint.get(KEY, {}), **checkpoint_entry(module, base.now())}
    if guarded and not module.lora_full_state_dict:
        add_tripwire(module, checkpoint["state_dict"])
    if module._trainer is None or module._trainer.is_global_zero:  # who writes the file
        add_digests(checkpoint)


def add_tripwire(module: nn.Module, state: dict[str, Any]) -> None:
    """A module without LoRA must not take this for its weights. With `strict` the unexpected name says
    what to do; without, an empty tensor under a frozen weight's name fits no plain layer."""
    state[ADVICE] = torch.empty(0)
    for name, layer in lora_layers(module).items():
        for parameter in set(layer.properties) & layer._parameters.keys():
            state[f"{name}.{parameter}"] = torch.empty(0)
            return


def restore_entry(module: Any, check_base: bool, base: KnownBase, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another base. Give the module the other adapters of the file, and a plan with
    other ranks, made by the same configuration (from other data), for its own."""
    type(module).on_load_checkpoint(module, checkpoint)
    if KEY not in checkpoint or not is_injected(module):
        return
    saved, active = adapters_in(checkpoint, "the checkpoint")
    if check_base:
        _check_base(base.now().fingerprint, checkpoint, "the checkpoint")
    module.__dict__["lora_trained"] = checkpoint[KEY].get("training", {})
    here = state_of(module)
    if active != here.active and set(active) <= here.adapters.keys() | saved.keys():
        raise AdapterFileError(
            f"the checkpoint was saved with {', '.join(active)} selected and holds their heads; the "
            f"module has {', '.join(here.active)}: select the same, LoRACallback(adapter={active[0]!r})."
        )
    differ = [(n, a.plan) for n, a in saved.items()] != [(n, a.plan) for n, a in here.adapters.items()]
    same = all(n in saved and saved[n].config == a.config for n, a in here.adapters.items())
    if differ and same:  # in the order of the file, which is that of the optimizer's state
        for one in saved.values():
            check_plan(module, one, "the checkpoint")
        eject(module)
        _make(module, saved, here.active)
        average_the_adapted(module.trainer, module)
    elif same:
        for name, adapter in here.adapters.items():
            adapter.plan = saved[name].plan  # which also says what data have decided
    _give_values(module, checkpoint)


def _make(module: nn.Module, saved: dict[str, SavedAdapter], active: tuple[str, ...]) -> None:
    for name, adapter in saved.items():
        make = attach_adapter if is_injected(module) else apply_plan
        make(module, adapter.config, adapter.plan, name, begins=False)
    activate(module, active)


def _check_base(here: dict[str, str], checkpoint: dict[str, Any], where: str) -> None:
    """A checkpoint that holds the base's weights too brings its own base."""
    saved, state = checkpoint[KEY].get("fingerprint", {}), checkpoint.get("state_dict", {})
    if all(n in state and state[n].numel() for n in saved):
        return
    if refusal := refusal_of_base(saved, here, f"the adapter in {where}"):
        raise AdapterFileError(refusal)


def _give_values(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Those of the selected adapter stand in the model, and in the checkpoint's state_dict, loaded next."""
    here, adapters = state_of(module), checkpoint[KEY]["adapters"]
    here.restoring = True
    for name in (adapters.keys() & here.adapters.keys()) - set(here.active[:1]):
        here.adapters[name].values.update(adapters[name]["values"])
