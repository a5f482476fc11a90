"""The two files of an adapter's folder, of our format or PEFT's, as a pair: written and read as one save."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from lora_lightning.errors import AdapterFileError, ConfigError
from lora_lightning.files.hubs.address import is_address
from lora_lightning.utils.atomic import make_folder, write_together
from lora_lightning.utils.mapping_file import read_mapping
from lora_lightning.utils.peft_names import PEFT_OPTIONS
from lora_lightning.utils.torch_file import require_file
from lora_lightning.utils.writers import on_the_way

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
GIVE = "Give a folder that save_adapter or PEFT wrote."
SAVE_AGAIN = "Save the adapter again."
LENGTH = 8  # bytes at the beginning of a safetensors file, which say how long its header is
PATIENCE = 1000  # readings of a folder into which others write all the time

Pair = tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]  # configuration, tensors, their metadata


def write_pair(
    folder: str | os.PathLike[str], text: str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` so that a reader finds both of before or
    both new, whenever the writer is killed and whoever else writes (`read_pair`).

    Raises:
        ConfigError: it is the address of a hub.
        WriteError: the folder cannot be written; files that stood there before are untouched.
    """
    if is_address(folder):
        raise ConfigError([f"folder={str(folder)!r}: give a folder; `lora-lightning push` uploads it."])
    folder = Path(folder)
    make_folder(folder)
    write_together(
        {
            folder / TENSOR_FILE: lambda path: save_file(tensors, path, metadata),
            folder / CONFIG_FILE: lambda path: Path(path).write_text(text, encoding="utf-8"),
        }
    )


def read_pair(folder: str | os.PathLike[str]) -> Pair:
    """Configuration, tensors and metadata of an adapter's folder, of whatever format, all of one save while
    others write into it; where the two files on the disk are not, as they are.

    A writer moves the tensors first. Who comes before the configuration has followed finds it on its way;
    who has read one file before and the other after reads again.

    Raises:
        AdapterFileError: a file is missing or cannot be read, or it is damaged.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, TENSOR_FILE):
        require_file(folder / name, f"{GIVE} It holds {CONFIG_FILE} and {TENSOR_FILE}.")
    for _ in range(PATIENCE):
        before = _stamps(folder)
        try:
            about = read_mapping(folder / CONFIG_FILE, SAVE_AGAIN)
            tensors, metadata = read_tensors(folder / TENSOR_FILE)
        except AdapterFileError:
            if _stamps(folder) == before:
                raise
            continue
        fellow = about if _of_one_save(about, metadata) else _fellow(folder, metadata)
        after = _stamps(folder)
        if fellow is not None and after[1:] == before[1:]:
            return fellow, tensors, metadata
        if after == before:
            return about, tensors, metadata
    raise AdapterFileError(f"{folder} cannot be read: others write into it all the time. Try again.")


def _fellow(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The configuration on its way that belongs to the tensors that are there already."""
    for path in on_the_way(folder, CONFIG_FILE):
        with contextlib.suppress(AdapterFileError):  # it has just arrived
            if _of_one_save(about := read_mapping(path, SAVE_AGAIN), metadata):
                return about
    return None


def _of_one_save(about: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    """Whether both files say that they belong together. PEFT's own say nothing."""
    if is_peft(about):
        return "sha256" not in metadata or metadata.get("config_sha256") == config_digest(about)
    return about.get("sha256") == metadata.get("sha256")


def _stamps(folder: Path) -> list[tuple[int, int, int]]:
    """Of each of the two files, what changes when another takes its place.

    Raises:
        AdapterFileError: it is gone.
    """
    try:
        stats = [os.stat(folder / name) for name in (CONFIG_FILE, TENSOR_FILE)]
    except OSError:
        raise AdapterFileError(f"{folder} was removed while it was read. Give another.") from None
    return [(s.st_ino, s.st_mtime_ns, s.st_size) for s in stats]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, in memory of their own: mapped ones change when somebody
    writes over the file, reading past its new end kills, and `safe_open` leaks some bytes of each tensor.

    Raises:
        AdapterFileError: it is missing, cannot be read, or is damaged.
    """
    with _told(path):
        data = path.read_bytes()
        tensors = load(data)
        header = json.loads(data[LENGTH : LENGTH + int.from_bytes(data[:LENGTH], "little")])
        return tensors, dict(header.get("__metadata__") or {})


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same of a large file, mapped: they are the file's contents as long as it is not written over in its
    place.

    Raises:
        AdapterFileError: it is missing, cannot be read, or is damaged.
    """
    with _told(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
        return tensors, dict(file.metadata() or {})


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say what is wrong with a safetensors file that is read within this context.

    Raises:
        AdapterFileError: it is missing, cannot be read, or is damaged.
    """
    require_file(path, "Give a .safetensors file.")
    try:
        yield
    except PermissionError as error:
        raise AdapterFileError(
            f"{path} cannot be read: {error.strerror or error}. Give one that can be."
        ) from None
    except Exception as error:  # safetensors' own, and what torch raises for types that it does not know
        raise AdapterFileError(
            f"{path} is damaged, cut short or not a safetensors file: {error}. Copy it anew."
        ) from None


def digest_of(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the description and the tensors' names, types, shapes and bytes."""
    digest = sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_peft(about: Mapping[str, Any]) -> bool:
    """Whether the contents of an `adapter_config.json` are PEFT's."""
    return "peft_type" in about


def config_digest(about: Mapping[str, Any]) -> str:
    """SHA-256 over what decides in PEFT's `adapter_config.json`; the rest may change, as PEFT changes it."""
    return digest_of({k: about[k] for k in (*PEFT_OPTIONS, "init_lora_weights") if about.get(k)}, {})


def peft_metadata(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], extras: Mapping[str, Any]
) -> dict[str, str]:
    """Metadata of a tensor file in PEFT's format: what PEFT has no place for, and digests of both files'
    contents."""
    texts = {"lora_lightning": json.dumps(extras), "config_sha256": config_digest(about)}
    return {"format": "pt", **texts, "sha256": digest_of(texts, tensors)}


def check_peft_digest(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path
) -> None:
    """PEFT's own files have none, and none of the configuration once PEFT has saved it again."""
    if not metadata.keys() & {"sha256", "config_sha256", "lora_lightning"}:
        return
    texts = {n: metadata.get(n) for n in ("lora_lightning", "config_sha256")}
    if metadata.get("sha256") != digest_of(texts, tensors):
        raise AdapterFileError(
            f"{folder / TENSOR_FILE} is damaged: it does not match its checksum. Save the adapter again."
        )
    if texts["config_sha256"] != config_digest(about):
        raise AdapterFileError(
            f"{folder / CONFIG_FILE} is damaged, was edited, or is of another save than {TENSOR_FILE}, which "
            "holds its checksum. Save the adapter again."
        )
