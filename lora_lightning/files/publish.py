"""An adapter's two files as they are given to others: the same values, without this machine's paths."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from lora_lightning.files.format import write_adapter
from lora_lightning.files.locate import AdapterSource, read_any
from lora_lightning.files.origin import Origin, without_place
from lora_lightning.files.pair import CONFIG_FILE, TENSOR_FILE, peft_metadata, read_pair, write_pair
from lora_lightning.utils.peft_names import PEFT_OPTIONS


def write_public(source: AdapterSource, folder: Path) -> dict[str, str]:
    """Write the adapter, in the format that it has, with what says how its model is built.

    Args:
        folder: made when it does not exist.

    Returns:
        What was shortened, since it names a file or folder of this machine: option -> how it was.

    Raises:
        AdapterFileError: the adapter cannot be read.
        WriteError: the folder cannot be written.
    """
    origin, changed = source.origin().public()
    if source.saved.foreign:
        return changed | _write_peft(source, origin, folder)
    if source.path.is_dir() and origin == source.saved.origin:
        _copy(source.path, folder)
    else:
        write_adapter(folder, dataclasses.replace(source.saved, origin=origin))
    return changed


def _copy(given: Path, folder: Path) -> None:
    """The same bytes, by which a hub knows that it has them; safetensors writes others each time.

    Raises:
        AdapterFileError: somebody was writing them.
    """
    folder.mkdir(exist_ok=True)
    for name in (CONFIG_FILE, TENSOR_FILE):
        shutil.copyfile(given / name, folder / name)
    read_any(folder)


def _write_peft(source: AdapterSource, origin: Origin, folder: Path) -> dict[str, str]:
    """PEFT's files; of those that we have written, with their digests made anew."""
    about, tensors, metadata = read_pair(source.path)
    changed: dict[str, str] = {}
    public = {name: _shortened(name, value, changed) for name, value in about.items()}
    if public == about and origin == source.saved.origin:
        _copy(source.path, folder)
        return changed
    if "lora_lightning" in metadata:
        extras = {**json.loads(metadata["lora_lightning"]), "origin": origin.to_dict()}
        metadata = peft_metadata(public, tensors, extras)
    else:
        metadata = {"format": "pt"}
    write_pair(folder, json.dumps(public, indent=2) + "\n", tensors, metadata)
    return changed


def _shortened(name: str, value: Any, changed: dict[str, str]) -> Any:
    """An option of PEFT's; those that decide are no places, whatever they look like."""
    if not isinstance(value, str) or name in (*PEFT_OPTIONS, "target_modules", "exclude_modules"):
        return value
    if (short := without_place(value)) != value:
        changed[name] = value
    return short
