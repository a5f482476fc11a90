"""All weights of a fine-tuned model, wherever they are: a module, a state dict, a file, a folder of parts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.state import is_injected
from lora_lightning.errors import AdapterFileError, UserError
from lora_lightning.files.hubs.fetch import fetched
from lora_lightning.files.locate import ADAPTER, WEIGHTS
from lora_lightning.files.pair import CONFIG_FILE
from lora_lightning.files.weights import read_weights
from lora_lightning.utils.mapping_file import read_mapping
from lora_lightning.utils.names import unwrapped
from lora_lightning.utils.torch_file import read_torch

GIVE = "Give a fine-tuned model: a .safetensors file, one of torch.save, a Trainer's checkpoint, or a folder."
IS_ADAPTER = "holds an adapter already: load it with lora_lightning.load_adapter"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = (WEIGHTS, "pytorch_model.bin")
WITHIN = ("state_dict", "model_state_dict", "model")  # where files of torch.save keep a state dict

Tuned = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


def tuned_state(tuned: Tuned) -> tuple[dict[str, Tensor], str]:
    """The state dict of a fine-tuned model, and what it is called in messages.

    Raises:
        AdapterFileError: there is no file, it is damaged or holds something else; nothing in it is executed.
        UserError: a model that is adapted, or something else than a model, a state dict or a path.
    """
    if isinstance(tuned, nn.Module):
        if is_injected(tuned):
            raise UserError(
                "tuned: it is an adapted model; call lora_lightning.eject(tuned, merged=True) first."
            )
        return _tensors(unwrapped(tuned).state_dict()), "tuned"
    if isinstance(tuned, Mapping):
        return _tensors(tuned), "tuned"
    if not isinstance(tuned, (str, os.PathLike)):
        raise UserError(
            f"tuned={type(tuned).__name__}: give a model, its state dict, or a file or folder of it."
        )
    path = fetched(tuned).expanduser()
    state = _of_folder(path) if path.is_dir() else _of_file(path)
    if not state:
        raise AdapterFileError(f"{path} holds no tensors. {GIVE}")
    if any(".lora_" in name or ".lora." in name for name in state):
        raise AdapterFileError(f"{path} {IS_ADAPTER}.")
    return state, str(path)


def refuse_adapter(path: str | os.PathLike[str]) -> None:
    """Refuse what is no fine-tuned model, but an adapter.

    Raises:
        AdapterFileError: it is the folder of one, or of a run that has saved nothing else.
    """
    path = fetched(path)
    run = (path / ADAPTER / CONFIG_FILE).is_file() and not (path / WEIGHTS).is_file()
    if run or (path / CONFIG_FILE).is_file():
        raise AdapterFileError(f"{path} {IS_ADAPTER}.")


def _of_folder(folder: Path) -> dict[str, Tensor]:
    """The weights in one file or several, as runs and the hub have them."""
    for name in INDICES:
        if (folder / name).is_file():
            return _of_parts(folder, name)
    if whole := next((folder / name for name in WHOLE if (folder / name).is_file()), None):
        return _of_file(whole)
    refuse_adapter(folder)
    if (folder / ".metadata").is_file():
        raise AdapterFileError(
            f"{folder} is a checkpoint in shards: make one file of it, "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {folder}"
        )
    raise AdapterFileError(f"{folder} holds none of {', '.join((*WHOLE, *INDICES))}. {GIVE}")


def _of_parts(folder: Path, index: str) -> dict[str, Tensor]:
    """A model in several files, by the index that says which holds what."""
    places = read_mapping(folder / index, GIVE).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(n, str) and isinstance(file, str) and Path(file).name == file for n, file in places.items()
    ):
        raise AdapterFileError(
            f"{folder / index} is damaged: it does not say which file holds which tensor. Copy it anew."
        )
    state: dict[str, Tensor] = {}
    for file in dict.fromkeys(places.values()):
        state |= _of_file(folder / file)
    if absent := [name for name in places if name not in state]:
        raise AdapterFileError(f"{folder} lacks {absent[0]}, which {index} names: copy or download it again.")
    return state


def _of_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_weights(path)[0]
    found = read_torch(path, GIVE)
    for key in WITHIN:
        if isinstance(found, dict) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    return _tensors(found) if isinstance(found, Mapping) else {}


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
