"""int8 of any format: what is wrong with its options, and that a file becomes smaller by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.exporting.formats import FORMATS, INT8, Format
from lora_lightning.exporting.subject import Subject

SMALLER = 0.8  # of the file in floats: more is not worth what it loses


def quantize_problems(quantize: str | None, calibration: Sequence[Any] | None, format: str) -> list[str]:
    """What is wrong with these options of `export`, one line each."""
    if quantize is None:
        return (
            ["calibration: is for int8 alone: leave it out, or give quantize='static'."]
            if calibration is not None
            else []
        )
    if format in FORMATS and format not in INT8:
        allowed = " or ".join(f"format={name!r}" for name in INT8)
        return [f"quantize={quantize!r}: not with format={format!r}: give {allowed}, or leave it out."]
    if calibration is not None and not isinstance(calibration, (list, tuple)):
        kind = type(calibration).__name__
        return [f"calibration: is of type {kind}: give a list of inputs, each as example is."]
    if quantize == "static" and not calibration:
        return [
            "quantize='static': give calibration, a list of a few dozen inputs such as the model will meet; "
            "or quantize='dynamic', which needs none."
        ]
    if quantize == "dynamic" and calibration is not None:
        return ["calibration: quantize='dynamic' takes none: leave it out, or give quantize='static'."]
    return []


def quantized(
    folder: Path, form: Format, subject: Subject, quantize: str, calibration: Sequence[Mapping[str, Tensor]]
) -> None:
    """Put the int8 file in the place of the file in floats.

    Args:
        calibration: inputs by name, for "static".

    Raises:
        LibraryError: a library is missing.
        UserError: the calibration is of other types or sizes than the file's inputs, or the model has next to
            nothing that can be quantized so.
    """
    for inputs in calibration:
        _refuse_others(inputs, subject)
    file = folder / form.file
    before = file.stat().st_size
    module = form.int8_module()
    module.quantize(file, subject, quantize, calibration)
    share = file.stat().st_size / before
    if share > SMALLER:
        other = "static" if quantize == "dynamic" else "dynamic"
        raise UserError(
            f"quantize={quantize!r}: leaves {share:.0%} of {type(subject.network).__name__}'s bytes: few of "
            f"them are weights in {', '.join(module.TAKEN[quantize])}. Leave it out, or give "
            f"quantize={other!r}."
        )


def _refuse_others(inputs: Mapping[str, Tensor], subject: Subject) -> None:
    """Refuse inputs that the file does not take.

    Raises:
        UserError: they are of other types or sizes.
    """
    for name, value in inputs.items():
        example, free = subject.inputs[name], subject.dynamic.get(name, {})
        if value.dtype != example.dtype:
            raise UserError(
                f"calibration: {name} is of {value.dtype}, and the file takes {example.dtype}: give such."
            )
        sizes = [free.get(axis, size) for axis, size in enumerate(example.shape)]
        if value.ndim != example.ndim or any(
            size != wanted for size, wanted in zip(value.shape, sizes, strict=True) if isinstance(wanted, int)
        ):
            raise UserError(
                f"calibration: {name} is {tuple(value.shape)}, and the file takes "
                f"({', '.join(map(str, sizes))}): give such."
            )
