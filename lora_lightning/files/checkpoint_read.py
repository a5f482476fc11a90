"""A Trainer's checkpoint with adapters in it: its file read and checked, and what it says understood.

`lora_lightning.trainer.checkpoint` writes the entry that is read here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora_lightning.errors import AdapterFileError, UserError, did_you_mean
from lora_lightning.files.checkpoint_digests import KEY, check_digests
from lora_lightning.files.format import VERSION, SavedAdapter, described
from lora_lightning.layers.update import LEAVES
from lora_lightning.utils.torch_file import read_torch

GIVE = "Give a checkpoint that a Trainer wrote."


def read_checkpoint(path: str | os.PathLike[str], remedy: str = GIVE, **how: Any) -> dict[str, Any]:
    """A Trainer's checkpoint, with adapters or without, compared with the checksums in it.

    Args:
        remedy: what to do when it cannot be read; ends each message.
        **how: `map_location`, `weights_only` and `mmap` of `read_torch`; by default nothing in it is run.

    Raises:
        AdapterFileError: it is missing, damaged, holds code, or is no Trainer's checkpoint.
    """
    return checked(read_torch(path, remedy, **how), path, remedy)


def checked(found: Any, where: object, remedy: str = GIVE) -> dict[str, Any]:
    """What was read, if it is a Trainer's checkpoint as it was written.

    Args:
        where: the file, for errors.

    Raises:
        AdapterFileError: it is not.
    """
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise AdapterFileError(f"{where} is not a Trainer's checkpoint: it has no state_dict. {remedy}")
    check_digests(found, where)
    return found


def require_adapter(checkpoint: Mapping[str, Any], where: object, remedy: str) -> None:
    """Refuse a checkpoint without adapters.

    Raises:
        AdapterFileError: it is one.
    """
    if not isinstance(checkpoint.get(KEY), dict):
        raise AdapterFileError(f"{where} holds no adapter: it was not saved with LoRACallback. {remedy}")


def adapter_in(
    checkpoint: Mapping[str, Any], where: str, adapter: str | None = None
) -> tuple[SavedAdapter, dict[str, Tensor]]:
    """An adapter of a Trainer's checkpoint, and the base's tensors if they are in it too.

    Args:
        adapter: None is the one that was selected.

    Raises:
        AdapterFileError: as `adapters_in`.
        UserError: it has no adapter of this name.
    """
    adapters, active = adapters_in(checkpoint, where)
    name = active[0] if adapter is None else adapter
    if name not in adapters:
        holds = ", ".join(adapters)
        raise UserError(f"adapter={name}: {where} holds {holds}.{did_you_mean(name, adapters)}")
    saved, about, state = adapters[name], checkpoint[KEY], _state(checkpoint)
    whole = all(saved.weight_name(p) in state for p in saved.plan.layers)
    top = f"{about['network']}." if about.get("network") else ""
    updates = {p.update(other) for other, one in adapters.items() for p in one.plan.layers}
    base_weights = {
        n.removeprefix(top): t
        for n, t in state.items()
        if whole and n.startswith(top) and n.rpartition(".")[0] not in updates
    }
    return saved, base_weights


def adapters_in(checkpoint: Mapping[str, Any], where: str) -> tuple[dict[str, SavedAdapter], tuple[str, ...]]:
    """All adapters of a Trainer's checkpoint, and the names of those that were selected.

    Raises:
        AdapterFileError: of another version, or a value in the description is not of its kind.
    """
    about = checkpoint[KEY]
    if not isinstance(checkpoint.get("state_dict", {}), dict):
        raise AdapterFileError(f"{where} is not a Trainer's checkpoint: it has no state_dict. {GIVE}")
    if about.get("version") != VERSION:
        raise AdapterFileError(
            f"{where} has format version {about.get('version')!r}; this release of lora_lightning reads "
            f"version {VERSION}. Upgrade lora-lightning."
        )
    adapters, active = about.get("adapters"), about.get("active")
    if not (
        isinstance(adapters, dict)
        and all(isinstance(n, str) and n.isidentifier() for n in adapters)
        and isinstance(active, list)
        and active
        and all(isinstance(n, str) and n in adapters for n in active)
        and isinstance(about.get("network", ""), str)
    ):
        raise AdapterFileError(f"{where} is damaged: it does not say which adapters it holds. Copy it anew.")
    return {n: _saved(n, chosen, checkpoint, where) for n, chosen in adapters.items()}, tuple(active)


def _saved(name: str, chosen: Any, checkpoint: Mapping[str, Any], where: str) -> SavedAdapter:
    if not (
        isinstance(chosen, dict)
        and isinstance(chosen.get("extra_trainables"), list)
        and all(isinstance(n, str) for n in chosen["extra_trainables"])
        and isinstance(chosen.get("values"), dict)
        and all(isinstance(t, Tensor) for t in chosen["values"].values())
    ):
        raise AdapterFileError(f"{where} is damaged: it does not say what was trained. Copy it anew.")
    saved = described({**checkpoint[KEY], **chosen}, {}, where)
    state = _state(checkpoint)
    values = {**state, **chosen["values"]}
    tensors = {n: values[n] for n in chosen["extra_trainables"] if n in values}
    for layer in saved.plan.layers:
        for part in LEAVES:
            if (stored := f"{layer.update(name)}.{part}") in state:
                tensors[layer.tensor(part)] = state[stored]
    return replace(saved, tensors=tensors)


def _state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the checkpoint's state_dict, which strategies that shard have taken out, but for the
    empty ones that guard it."""
    state = checkpoint.get("state_dict", {})
    return {n: t for n, t in state.items() if isinstance(t, Tensor) and t.numel()}
