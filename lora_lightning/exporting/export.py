"""export: an adapted model as a file that other programs run, checked, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lora_lightning.adapters.base_values import refuse_meta
from lora_lightning.adapters.manage import adapter_names, adapters_off, set_adapter, unmerge
from lora_lightning.exporting.card import CARD, ExportCard, card_of
from lora_lightning.exporting.checks import compare, fresh_inputs
from lora_lightning.exporting.factors import opened
from lora_lightning.exporting.folder import FACTS, folder_problem, written
from lora_lightning.exporting.formats import FORMATS, Format
from lora_lightning.exporting.meaning import KINDS, meaning_problems
from lora_lightning.exporting.quantize import quantize_problems, quantized
from lora_lightning.exporting.script import script_of
from lora_lightning.exporting.subject import (
    Axes,
    Example,
    Subject,
    axes_of,
    copied,
    inputs_of,
    named_outputs,
    normalization,
    refused,
    subject_of,
)
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import one_of
from lora_lightning.utils.sharding import refuse_sharded

SCRIPT, EXAMPLE = "run.py", "example.npz"
LIKE = 2  # inputs of a calibration, on which int8 is compared
SELECTED = ""  # of adapters: those that are
PREPROCESS, NAMES = "preprocess.json", "names.json"


@dataclass(frozen=True)
class Exported:
    """A folder that was written.

    Attributes:
        folder: where it is.
        format: a key of `lora_lightning.exporting.formats.FORMATS`.
        file: the model's file in it.
        bytes: of that file, and of the weights beside it.
        files: all names in the folder.
        inputs: names and sizes, with the names of dynamic axes.
        outputs: names.
        difference: the largest from the adapted model on fresh inputs, or of "static" on those of the
            calibration, of the output's scale.
        sizes: of the inputs on which it was checked.
        quantize: "dynamic" or "static", where weights are int8.
    """

    folder: Path
    format: str
    file: str
    bytes: int
    files: tuple[str, ...]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    difference: float
    sizes: tuple[dict[str, tuple[int, ...]], ...]
    quantize: str | None = None

    def __str__(self) -> str:
        title = FORMATS[self.format].title + (f", int8 ({self.quantize})" if self.quantize else "")
        lines = [f"{self.folder / self.file}: {self.bytes:,} bytes, {title}"]
        given = (
            "inputs of the calibration" if self.quantize == "static" else f"{len(self.sizes)} fresh inputs"
        )
        if self.inputs:
            shapes = ", ".join(f"{name} ({', '.join(map(str, s))})" for name, s in self.inputs.items())
            lines += [
                f"takes {shapes}; gives {', '.join(self.outputs)}",
                f"differs from the model by {self.difference:.1e} of the output's scale at most, on {given}",
            ]
        others = ", ".join(name for name in self.files if name != self.file)
        return "\n".join([*lines, f"beside it: {others}"])


def export(
    model: nn.Module,
    example: Example | None,
    out: str | os.PathLike[str],
    *,
    format: Annotated[str, one_of(*FORMATS)] = "onnx",
    dynamic: bool | Mapping[str, Mapping[int, str]] = True,
    preprocess: Mapping[str, Any] | None = None,
    inside: bool = False,
    names: Sequence[str] | None = None,
    kind: str | None = None,
    scale: Mapping[str, float] | None = None,
    check: Sequence[Example] | None = None,
    quantize: Literal["dynamic", "static"] | None = None,
    calibration: Sequence[Example] | None = None,
    about: ExportCard | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model, its updates in its weights, as a file that needs nothing of this package.

    The file is run and compared with the adapted model in eval mode on fresh inputs, at two sizes of every
    dynamic axis, before the folder appears. Beside it lie a card (`README.md`), an example of inputs, and
    `run.py`, which runs it with its runtime and numpy alone. The model is left as it is.

    Args:
        model: adapted or not; on any device, of any mode.
        example: inputs that it takes: a tensor, a tuple of them, or a dictionary by the names of `forward`'s
            arguments. None with "safetensors", whose values are then compared in place of outputs.
        out: the folder to write.
        format: "onnx", "onnx_adapters" (one base and a small file for each adapter of the model, chosen in
            each request), "pt2" (`torch.export`), "aoti" (AOTInductor, compiled for this machine),
            "executorch" (of one size, for phones), "safetensors" (plain weights for the model's own library).
        dynamic: the axes of any size: True is the first of every input, False none, else by input:
            `{"waves": {0: "batch", 1: "samples"}}`.
        preprocess: what is done to inputs before, for `preprocess.json`: of pictures mean and std of values
            in [0, 1], and what else there is; of sound the sample_rate.
        inside: bytes of pictures go in, (batch, 3, height, width) in uint8; mean and std are a part of the
            file.
        names: of classes, or of a vocabulary, for `names.json`.
        kind: what comes out, for `run.py`: "class", "classes", "number", "masks", "boxes" or "text" (of
            CTC); None is "class" where there are names.
        scale: of outputs, for `run.py`: the temperature of logits; mean and std of a number.
        check: inputs, as `example`, on which the file is compared; None makes some of the example.
        quantize: int8, of format "onnx": "dynamic", the weights of matrix products and LSTMs; "static",
            convolutions too and activations, by the ranges that `calibration` shows. The file is checked
            before in floats; `difference` is then what int8 costs, and no more is promised of it.
        calibration: for "static": a few dozen inputs, as `example`, such as the model will meet.
        about: what the card tells of base, licence, data and scores.
        overwrite: replace an exported model that lies in the folder.

    Returns:
        What was written; `print` it.

    Raises:
        ConfigError: one line for each bad option.
        UserError: the model cannot be written so, or the file gives something else; nothing is left behind.
        LibraryError: a library of the format is missing.
        WriteError: the disk is full, or the folder cannot be written.

    Example:
        >>> told = export(nn.Linear(8, 2), torch.randn(1, 8), "deployed", format="safetensors")
        >>> told.files
        ('README.md', 'export.json', 'model.safetensors')
    """
    out = Path(out).expanduser()
    kind = kind or ("class" if names and format != "safetensors" else None)
    problems = [
        folder_problem(out, overwrite),
        _lacking(example, format),
        _fixed(dynamic, format),
        *meaning_problems(names, kind, preprocess, inside),
        *quantize_problems(quantize, calibration, format),
    ]
    require(export, locals(), problems)
    refuse_sharded(model, "export")
    refuse_meta(model, "export")
    form = FORMATS[format]
    inputs = {} if example is None else inputs_of(model, example)
    axes = axes_of(inputs, dynamic)
    shown = dict(preprocess or {})
    tried = [inputs_of(model, one) for one in check] if check else None
    if inside:
        inputs = {name: _bytes(value) for name, value in inputs.items()}
        tried = [{name: _bytes(value) for name, value in one.items()} for one in tried] if tried else None
    tried = [] if example is None else tried or fresh_inputs(inputs, axes)
    normal = shown if inside else None
    subject = (opened if form.adapters else subject_of)(model, inputs, axes, normal)
    choices = [None, *adapter_names(model)] if form.adapters else [SELECTED]
    pairs = {choice: _wanted(model, tried, normal, choice) for choice in choices}
    with written(out, overwrite) as folder:
        form.write(subject, folder)
        runs = form.load(folder, subject)
        of_each = runs if isinstance(runs, dict) else {SELECTED: runs}
        difference = max(
            compare(run, pairs[choice], f"{out / form.file}{f' with {choice}' if choice else ''}")
            for choice, run in of_each.items()
        )
        if quantize is not None:
            shown_by = [inputs_of(model, one) for one in calibration or ()]
            quantized(folder / form.file, subject, quantize, shown_by)
            run: Any = form.load(folder, subject)
            pairs[SELECTED] = _wanted(model, shown_by[:LIKE], normal, SELECTED) or pairs[SELECTED]
            difference = compare(run, pairs[SELECTED], f"{out / form.file}", most=inf)
        size = sum(path.stat().st_size for path in folder.iterdir())
        told = _facts(form, format, subject, inputs, axes, kind, inside, size, difference)
        told["quantize"] = quantize
        _write_beside(folder, form, told, inputs, preprocess, names, kind, scale)
        told["files"] = sorted([*(path.name for path in folder.iterdir()), CARD, FACTS])
        text = card_of(about or ExportCard(), told, form.title, " ".join(form.needs))
        (folder / CARD).write_text(text, encoding="utf-8")
        _write_json(folder / FACTS, told)
    return Exported(
        out, format, form.file, size, tuple(told["files"]),
        {one["name"]: tuple(one["shape"]) for one in told["inputs"]},
        subject.outputs, difference,
        tuple({name: tuple(value.shape) for name, value in one.items()} for one in tried), quantize,
    )  # fmt: skip


def _lacking(example: Example | None, format: str) -> str | None:
    if example is not None or format == "safetensors":
        return None
    return "example=None: give inputs that the model takes; format='safetensors' alone needs none."


def _fixed(dynamic: bool | Mapping[str, Mapping[int, str]], format: str) -> str | None:
    if not dynamic or format not in FORMATS or not FORMATS[format].single:
        return None
    return f"dynamic={dynamic!r}: {format} plans its memory for inputs of one size: give dynamic=False."


@torch.no_grad()
def _wanted(
    model: nn.Module,
    tried: Sequence[Mapping[str, Tensor]],
    shown: Mapping[str, Any] | None,
    choice: str | None,
) -> list[tuple[Mapping[str, Tensor], list[Tensor]]]:
    """Inputs and what the adapted model, of which nothing is merged, gives for them.

    Args:
        choice: the adapter; None is none of them, SELECTED those that are selected.

    Raises:
        UserError: it does not take them.
    """
    twin = copied(model).eval().cpu()
    if choice:
        unmerge(twin)
        set_adapter(twin, choice)
    moved = normalization(shown)
    pairs = []
    for one in tried:
        given = dict(one)
        if moved is not None:
            given = {name: (value.float() / 255 - moved[0]) / moved[1] for name, value in one.items()}
        base = adapters_off(twin) if choice is None else contextlib.nullcontext()
        with base, refused(twin, given, "Leave out of dynamic what is of one size, or give check=."):
            found = named_outputs(twin(**given))
        pairs.append((one, [tensor for _, tensor in found]))
    return pairs


def _bytes(pictures: Tensor) -> Tensor:
    """Pictures of bytes of the size of an example's."""
    if pictures.dtype == torch.uint8:
        return pictures
    source = torch.Generator().manual_seed(0)
    return torch.randint(256, pictures.shape, generator=source, dtype=torch.uint8)


def _facts(
    form: Format,
    name: str,
    subject: Subject,
    inputs: Mapping[str, Tensor],
    axes: Axes,
    kind: str | None,
    inside: bool,
    size: int,
    difference: float,
) -> dict[str, Any]:
    """What export.json says, but for the names of the files."""
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
        "versions": {package: found for package in form.packages if (found := _version(package))},
    }


def _write_beside(
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
        _write_json(folder / PREPROCESS, {**preprocess, "inside": told["inside"]})
    if names is not None or kind is not None:
        about = {"kind": kind, "names": list(names or ()), "temperature": 1.0, **(scale or {})}
        _write_json(folder / NAMES, about)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
