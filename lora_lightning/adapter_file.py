"""The two files of an adapter: how they are written together, read and checked, without any model."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import AdapterFileError
from lora_lightning.files import write_together
from lora_lightning.fingerprint import is_fingerprint
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LEAVES
from lora_lightning.plans import Plan
from lora_lightning.quantized import QUANTIZERS

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
FORMAT = "lora_lightning"
VERSION = 1
LARGEST_CONFIG = 16 * 2**20  # bytes; a thousand adapted layers take less than one MiB


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter apart from any model.

    Attributes:
        tensors: updates under `<name in the plan>.lora_A`, `.lora_B` and `.lora_magnitude`; the model's own
            trained tensors under their names in `state_dict()`.
        slots: how the weight of each planned layer factorizes, by the layer's name.
        base_class: class of the network that was adapted.
        base: the base's fingerprint; empty when it is not known.
        quantized: "int8" or "nf4" by the base's parameters that were so kept.
        training: what is known of the training, such as `{"epochs": 5, "steps": 100}`.
        foreign: read from PEFT's files, which leave open what only a model can tell.
    """

    config: LoRAConfig
    plan: Plan
    tensors: dict[str, Tensor]
    slots: dict[str, Slot]
    base_class: str = ""
    base: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    foreign: bool = False

    def update_names(self) -> set[str]:
        """Names in `tensors` of the updates, by the plan."""
        return {layer.tensor(leaf) for layer in self.plan.layers for leaf in LEAVES}

    def description(self) -> dict[str, Any]:
        """All but the tensors, in plain types."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "base_class": self.base_class,
            "training": self.training,
            "config": self.config.to_dict(),
            "plan": self.plan.to_dict(),
            "slots": {name: _slot_dict(slot) for name, slot in self.slots.items()},
            "base": self.base,
            **({"quantized": self.quantized} if self.quantized else {}),
        }


def write_adapter(folder: str | os.PathLike[str], saved: SavedAdapter) -> None:
    """Write both files. Each holds one digest over the contents of both, so that damage, and two files
    of different saves, are found.

    Raises:
        OSError: the folder cannot be written; files that stood there before are untouched.
    """
    about = saved.description()
    tensors = {n: t.detach().contiguous().cpu() for n, t in saved.tensors.items()}
    digest = digest_of(about, tensors)
    text = json.dumps({**about, "sha256": digest}, indent=1) + "\n"
    write_pair(folder, text, tensors, {"format": "pt", "sha256": digest})


def write_pair(
    folder: str | os.PathLike[str], text: str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` so that a crash leaves the files of
    before, the new ones, or at worst one of each, which the digest tells."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the adapter's folder is a file", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    write_together(
        {
            folder / TENSOR_FILE: lambda path: save_file(tensors, path, metadata),
            folder / CONFIG_FILE: lambda path: Path(path).write_text(text, encoding="utf-8"),
        }
    )


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of `adapter_config.json`, of whatever format.

    Raises:
        AdapterFileError: a file is missing or cannot be read, or this one is no JSON object.
    """
    for name in (CONFIG_FILE, TENSOR_FILE):
        _require_file(Path(folder), name)
    path = Path(folder) / CONFIG_FILE
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_CONFIG + 1)
        if len(text) > LARGEST_CONFIG:
            raise ValueError(f"larger than {LARGEST_CONFIG >> 20} MiB")
        about = json.loads(text.decode("utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}. Save the adapter again.") from None
    if not isinstance(about, dict):
        raise AdapterFileError(f"{path} is not an adapter of lora_lightning: it holds no JSON object.")
    return about


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        AdapterFileError: it cannot be read, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except PermissionError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # safetensors' own, and what torch raises for types that it does not know
        raise AdapterFileError(f"{path} is damaged or not a safetensors file: {error}.") from None


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Read and check an adapter's two files.

    Raises:
        AdapterFileError: a file is missing, damaged, of another format, of a newer version or of another
            save than its fellow.
    """
    path, about = Path(folder) / CONFIG_FILE, read_config(folder)
    if about.get("format") != FORMAT:
        raise AdapterFileError(f"{path} is not an adapter of lora_lightning.")
    if about.get("version") != VERSION:
        raise AdapterFileError(
            f"{path} has format version {about.get('version')!r}; this release of lora_lightning reads "
            f"version {VERSION}. Upgrade lora-lightning."
        )
    tensors, metadata = read_tensors(Path(folder) / TENSOR_FILE)
    stated = about.pop("sha256", None)
    if stated != metadata.get("sha256"):
        raise AdapterFileError(
            f"{CONFIG_FILE} and {TENSOR_FILE} in {folder} are of two different saves, or damaged: their "
            f"checksums differ. Copy both from one place, or save the adapter again."
        )
    if stated != digest_of(about, tensors):
        raise AdapterFileError(
            f"{folder} is damaged: the contents of {CONFIG_FILE} or {TENSOR_FILE} do not match their "
            f"checksum. They are not to be edited by hand: save the adapter again."
        )
    return described(about, tensors, str(path))


def described(about: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> SavedAdapter:
    """The inverse of `SavedAdapter.description`.

    Args:
        where: named in errors.

    Raises:
        AdapterFileError: a value is not of its kind.
    """
    try:
        plan = Plan.from_dict(about["plan"])
        slots = {layer.name: _slot(about["slots"][layer.name]) for layer in plan.layers}
        if not is_fingerprint(about["base"]) or not isinstance(about["training"], dict):
            raise TypeError("its base or training is of another kind")
        quantized = about.get("quantized", {})
        if not all(isinstance(n, str) and kind in QUANTIZERS for n, kind in quantized.items()):
            raise TypeError("its weights are quantized in a way that is not known here")
        return SavedAdapter(
            LoRAConfig(**about["config"]),
            plan,
            tensors,
            slots,
            str(about["base_class"]),
            about["base"],
            quantized,
            about["training"],
        )
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterFileError(f"{where} is damaged: {error}. Save the adapter again.") from None


def digest_of(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the description and the tensors' names, types, shapes and bytes."""
    digest = sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_file(folder: Path, name: str) -> None:
    path = folder / name
    if path.is_dir():
        raise AdapterFileError(f"{path} is a folder, not a file: {folder} is not an adapter.")
    if not path.is_file():
        broken = " (a link that leads nowhere)" if path.is_symlink() else ""
        raise AdapterFileError(
            f"{folder} is not an adapter: it has no {name}{broken}. "
            f"Give a folder that save_adapter wrote; it holds {CONFIG_FILE} and {TENSOR_FILE}."
        )


def _slot_dict(slot: Slot) -> dict[str, Any]:
    """What differs from a slot of a whole `weight`."""
    default = asdict(Slot("weight"))
    return {k: list(v) if k == "rows" else v for k, v in asdict(slot).items() if v != default[k]}


def _slot(values: Mapping[str, Any]) -> Slot:
    kinds = {"parameter": str, "rows": list, "groups": int, "transposed": bool, "zero": str, "part": bool}
    for name, value in values.items():
        if type(value) is not kinds[name]:
            raise TypeError(f"slot option {name}={value!r}")
    rows = values.get("rows")
    if rows is not None and not (
        len(rows) == 2 and all(type(r) is int for r in rows) and 0 <= rows[0] < rows[1]
    ):
        raise ValueError(f"slot rows={rows!r}")
    if values.get("groups", 1) < 1:
        raise ValueError(f"slot groups={values['groups']!r}")
    return Slot(**{"parameter": "weight", **values, "rows": tuple(rows) if rows else None})
