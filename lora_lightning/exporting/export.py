"""export: an adapted model as a file that other programs run, checked, in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base_values import refuse_meta
from lora_lightning.adapters.manage import adapter_names
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.exporting.beside import facts_of, write_beside, write_json
from lora_lightning.exporting.card import CARD, ExportCard, card_of
from lora_lightning.exporting.checks import Pair, Run, compare, refuse_elsewhere
from lora_lightning.exporting.exported import Exported
from lora_lightning.exporting.factors import opened
from lora_lightning.exporting.folder import FACTS, folder_problem, written
from lora_lightning.exporting.formats import FORMATS, Format
from lora_lightning.exporting.given import Given, given_of
from lora_lightning.exporting.guards import elsewhere
from lora_lightning.exporting.meaning import meaning_problems, misfit
from lora_lightning.exporting.quantize import quantize_problems, quantized
from lora_lightning.exporting.reference import SELECTED, Reference
from lora_lightning.exporting.subject import Example, Subject, subject_of
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import one_of
from lora_lightning.utils.sharding import refuse_sharded

LIKE = 2  # inputs of a calibration, on which int8 is compared
PLAIN = "safetensors"  # the format that is no program


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
        quantize: int8, of "onnx", "aoti" and "executorch": "dynamic", the weights of matrix products, in ONNX
            LSTMs, too; "static", convolutions and activations, by the ranges that `calibration` shows. The
            file is checked before in floats; `difference` is then what int8 costs, and no more is promised.
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
    kind = kind or ("class" if names and format != PLAIN else None)
    problems = [
        folder_problem(out, overwrite),
        _lacking(example, format),
        _fixed(dynamic, format),
        *meaning_problems(names, kind, preprocess, inside, scale),
        _no_list("check", check),
        _no_card(about),
        *quantize_problems(quantize, calibration, format),
    ]
    require(export, locals(), problems)
    refuse_sharded(model, "export")
    refuse_meta(model, "export")
    form = FORMATS[format]
    given = given_of(model, example, dynamic, check, calibration, inside)
    _refuse_bfloat16(model, given.example, format)
    normal = dict(preprocess or {}) if inside else None
    subject = (opened if form.adapters else subject_of)(model, given.example, given.axes, normal)
    choices = [None, *adapter_names(model)] if form.adapters else [SELECTED]
    models = {choice: Reference(model, normal, choice) for choice in choices}
    pairs = {choice: [(one, models[choice](one)) for one in given.tried] for choice in choices}
    if problem := misfit(kind, names, next((found for _, found in pairs[choices[0]]), None)):
        raise ConfigError([problem])
    file = _File(form, out / form.file, subject, kind == "boxes")
    with written(out, overwrite) as folder:
        form.write(subject, folder)
        difference = file.differs(folder, given, models, pairs)
        if quantize is not None:
            quantized(folder, form, subject, quantize, given.calibration)
            like = [(one, models[SELECTED](one)) for one in given.calibration[:LIKE]] or pairs[SELECTED]
            difference = file.differs_in_int8(folder, like)
        size = sum(path.stat().st_size for path in folder.iterdir())
        told = facts_of(
            form, format, subject, given.example, given.axes, kind, inside, size, difference, quantize
        )
        write_beside(folder, form, told, given.example, preprocess, names, kind, scale)
        told["files"] = sorted([*(path.name for path in folder.iterdir()), CARD, FACTS])
        text = card_of(about or ExportCard(), told, form.title, " ".join(form.needs))
        (folder / CARD).write_text(text, encoding="utf-8")
        write_json(folder / FACTS, told)
    return Exported(
        out, format, form.file, size, tuple(told["files"]),
        {one["name"]: tuple(one["shape"]) for one in told["inputs"]},
        subject.outputs, difference,
        tuple({name: tuple(value.shape) for name, value in one.items()} for one in given.tried), quantize,
    )  # fmt: skip


@dataclass(frozen=True)
class _File:
    """A file that was written, to be compared with its model.

    Attributes:
        place: where it will lie, for errors.
        boxes: whether boxes come out.
    """

    form: Format
    place: Path
    subject: Subject
    boxes: bool

    def differs(
        self,
        folder: Path,
        given: Given,
        models: Mapping[str | None, Reference],
        pairs: Mapping[str | None, Sequence[Pair]],
    ) -> float:
        """The largest difference with any choice of an adapter.

        Args:
            models, pairs: by the choice; the first is looked at where other sizes take another way, too.

        Raises:
            UserError: it is too large.
        """
        runs: Any = self.form.load(folder, self.subject)
        of_each: dict[str | None, Run] = runs if isinstance(runs, dict) else {SELECTED: runs}
        first, others = next(iter(models)), elsewhere(self.subject, given.example, given.axes)
        refuse_elsewhere(of_each[first], models[first], others, type(self.subject.network).__name__)
        return max(
            compare(
                run, pairs[choice], f"{self.place}{f' with {choice}' if choice else ''}", boxes=self.boxes
            )
            for choice, run in of_each.items()
        )

    def differs_in_int8(self, folder: Path, pairs: Sequence[Pair]) -> float:
        """The same of a file in int8, of which any is accepted."""
        run: Any = self.form.load(folder, self.subject)
        return compare(run, pairs, f"{self.place}", most=inf, boxes=self.boxes)


def _lacking(example: Example | None, format: str) -> str | None:
    if example is not None or format == PLAIN:
        return None
    return "example=None: give inputs that the model takes; format='safetensors' alone needs none."


def _fixed(dynamic: bool | Mapping[str, Mapping[int, str]], format: str) -> str | None:
    if not dynamic or format not in FORMATS or not FORMATS[format].single:
        return None
    return f"dynamic={dynamic!r}: {format} plans its memory for inputs of one size: give dynamic=False."


def _no_list(option: str, given: object) -> str | None:
    if given is None or isinstance(given, (list, tuple)):
        return None
    return f"{option}: is of type {type(given).__name__}: give a list of inputs, each as example is."


def _no_card(about: object) -> str | None:
    if about is None or isinstance(about, ExportCard):
        return None
    return f"about={about!r}: give an ExportCard."


def _refuse_bfloat16(model: nn.Module, inputs: Mapping[str, Tensor], format: str) -> None:
    """Refuse what no array of numpy holds, and run.py gives arrays to the runtimes.

    Raises:
        UserError: the model or its inputs are in bfloat16.
    """
    tensors = [*model.parameters(), *model.buffers(), *inputs.values()]
    if format != PLAIN and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise UserError(
            f"export: {type(model).__name__} or its inputs are in bfloat16, which run.py's arrays cannot be: "
            "give model.float(), and inputs in float32."
        )
