"""What lies beside an exported file: its example, run.py, preprocessing and names, and what is told of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lora_lightning.exporting.formats import Format
from lora_lightning.exporting.meaning import KINDS, SCALES
from lora_lightning.exporting.script import script_of
from lora_lightning.exporting.subject import Axes, Subject

SCRIPT, EXAMPLE = "run.py", "example.npz"
PREPROCESS, NAMES = "preprocess.json", "names.json"


def facts_of(
    form: Format,
    name: str,
    subject: Subject,
    inputs: Mapping[str, Tensor],
    axes: Axes,
    kind: str | None,
    inside: bool,
    size: int,
    difference: float,
    quantize: str | None,
) -> dict[str, Any]:
    """What export.json says, but for the names of the files."""
    packages = (*form.packages, form.quantizer) if quantize and form.quantizer else form.packages
    return {
        "format": name,
        "file": form.file,
        "bytes": size,
        "network": type(subject.network).__name__,
        "inputs": [
            {
                "name": key,
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": [axes.get(key, {}).get(axis, length) for axis, length in enumerate(value.shape)],
            }
            for key, value in inputs.items()
        ],
        "outputs": list(subject.outputs),
        "means": KINDS.get(kind or "", ""),
        "inside": inside,
        "difference": difference,
        "versions": {package: found for package in packages if (found := _version(package))},
        "quantize": quantize,
    }


def write_beside(
    folder: Path,
    form: Format,
    told: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    preprocess: Mapping[str, Any] | None,
    names: Sequence[str] | None,
    kind: str | None,
    scale: Mapping[str, float] | None,
) -> None:
    """The example, run.py, preprocessing and names."""
    if form.imports:
        arrays: dict[str, Any] = {name: value.numpy() for name, value in inputs.items()}
        np.savez(folder / EXAMPLE, **arrays)
        text = script_of(form, tuple(inputs), kind or "", preprocess, told["inside"])
        (folder / SCRIPT).write_text(text, encoding="utf-8")
    if preprocess is not None:
        write_json(folder / PREPROCESS, {**preprocess, "inside": told["inside"]})
    if names is not None or kind is not None:
        about = {"kind": kind, "names": list(names or ()), **SCALES.get(kind or "", {}), **(scale or {})}
        write_json(folder / NAMES, about)


def write_json(path: Path, value: Any) -> None:
    """Write plain values, for programs."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
