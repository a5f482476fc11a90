"""`lora-lightning export`: what was trained as a file that other programs run, with its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from lora_lightning.app.evaluate import tester
from lora_lightning.app.evaluation_data import data_or_problems
from lora_lightning.app.export_card import UNKNOWN, export_card
from lora_lightning.app.export_scores import FileScores, file_scores
from lora_lightning.app.export_tasks import (
    AXES,
    SINGLE,
    Given,
    kind_of,
    pictures_of_classes,
    pictures_of_masks,
    size_problem,
    sound_of_text,
)
from lora_lightning.app.loading_lines import plain_network
from lora_lightning.app.results import Result
from lora_lightning.app.several_adapters import Several
from lora_lightning.app.trained import Trained, named
from lora_lightning.app.training_inputs import training_inputs
from lora_lightning.errors import UserError
from lora_lightning.exporting.card import ExportCard
from lora_lightning.exporting.export import export as export_model
from lora_lightning.exporting.exported import Exported
from lora_lightning.exporting.folder import folder_problem
from lora_lightning.exporting.formats import FORMATS, INT8, SCORED
from lora_lightning.exporting.scores import add_scores
from lora_lightning.exporting.subject import Example, inputs_of, rows_of, to_bytes
from lora_lightning.files.locate import AdapterSource
from lora_lightning.tasks.scores import Score
from lora_lightning.utils.marks import show
from lora_lightning.utils.tables import printable

WEIGHTS, ONNX, STATIC = "safetensors", "onnx", "static"
TESTED = (pictures_of_classes, pictures_of_masks, sound_of_text)  # whose network a file takes the place of
CALIBRATING = 8  # training batches, by which ranges of int8 are chosen
SINGLES = 64  # of their rows, where the file takes one at a time


def export(options: Mapping[str, Any], words: Sequence[str]) -> str:
    """Export what was trained, or a recipe's base.

    Args:
        options: of the command `export`, by name.
        words: `recipe=NAME key=value …`; none takes the run that the adapter or checkpoint lies in, or what
            came with it.

    Returns:
        What was written, in a few lines; and with `evaluate` the scores.

    Raises:
        UserError: every mistake in one message, before the model is built; or it cannot be exported so.
        WriteError: the folder cannot be written.
    """
    told, scores = exported(options, words)
    return printable(f"{told}\n\n{scores}" if scores else str(told))


def exported(
    options: Mapping[str, Any],
    words: Sequence[str],
    results: Sequence[Result] | None = None,
    scores: Sequence[Score] | None = None,
) -> tuple[Exported, FileScores | None]:
    """What `export` does; and what the file scores, with `evaluate`.

    Args:
        results, scores: for the card, of a run that has not yet written them.
    """
    out, format = Path(options["out"]).expanduser(), options.get("format", ONNX)
    problems = [p for p in [folder_problem(out, bool(options.get("overwrite")))] if p]
    several = Several.of(options, problems)
    trained = named(several.options, words, problems)
    data = None
    if trained:
        problems += [*_problems(trained, options, format), *several.problems(trained)]
        if not problems and _of_data(options):
            data = _data(trained, options, problems)
    if problems or trained is None:
        raise UserError("\n".join(dict.fromkeys(problems)))
    check_base = bool(options.get("check_base", True))
    task, test = tester(trained, data, check_base, pictured=False) if data else (None, None)
    model, facts = several.model(trained, check_base, merged=not FORMATS[format].adapters)
    if problem := size_problem(model, options.get("axes", "")):
        raise UserError(problem)
    if format == WEIGHTS:
        given = Given(plain_network(model), None)
    else:
        kind = kind_of(trained)
        usual = SINGLE if FORMATS[format].single else AXES[kind][0]
        given = kind(trained, model, facts, options.get("axes", usual))
    about = several.card(export_card(trained, model, facts, FORMATS[format].adapters, results, scores))
    inside = bool(options.get("bytes"))
    shown = given.preprocess if inside else None
    calibration = None
    if data and options.get("quantize") == STATIC:
        inputs = training_inputs(task, data, CALIBRATING, "export")
        calibration = _calibration(model, inputs, shown, given.dynamic is False)
    told = export_model(
        given.model, given.example, out,
        format=format, dynamic=given.dynamic, preprocess=given.preprocess, inside=inside,
        names=given.names, kind=given.kind, scale=several.scale(given.scale), check=given.check,
        quantize=options.get("quantize"), calibration=calibration,
        about=about, overwrite=bool(options.get("overwrite")),
    )  # fmt: skip
    if test is None or not options.get("evaluate"):
        return told, None
    found = file_scores(task, test, told, shown)
    add_scores(told.folder, _with_file(about, found), found.values)
    return told, found


def _data(trained: Trained, options: Mapping[str, Any], problems: list[str]) -> L.LightningDataModule | None:
    """The data of the run, which calibrate and test; or a line for each reason why they are not here."""
    found: list[str] = []
    data = data_or_problems(trained, [], found)
    need = " and ".join(_of_data(options))
    problems += [
        f"{need}: needs the data of the run: {reason} Or give quantize=dynamic, and leave evaluate out."
        for reason in found
    ]
    return data


def _of_data(options: Mapping[str, Any]) -> list[str]:
    """The options that need the data of the run, as they were given."""
    return [f"{n}={show(options[n])}" for n in ("quantize", "evaluate") if options.get(n) in (STATIC, True)]


def _calibration(
    model: nn.Module, inputs: list[Any], shown: Mapping[str, Any] | None, singly: bool
) -> list[Example]:
    """What training has shown to the network, as the file takes it: in bytes where `shown`, or singly."""
    named = [inputs_of(model, one) for one in inputs]
    if shown is not None:
        named = [{name: to_bytes(value, shown) for name, value in one.items()} for one in named]
    if singly:
        named = [row for one in named for row in rows_of(one)][:SINGLES]
    return [*named]


def _with_file(about: ExportCard, scores: FileScores) -> ExportCard:
    """A card that has what the file scores beside the scores that it has."""
    of_file = {label: new for label, _, new in scores.rows}
    if about.results and {row[0] for row in about.results[1:]} & of_file.keys():
        header, *rows = about.results
        rows = [(*row, of_file.get(row[0], UNKNOWN)) for row in rows]
        return replace(about, results=((*header, "this file"), *rows))
    return replace(about, results=(("score", "the model", "this file"), *scores.rows))


def _problems(trained: Trained, options: Mapping[str, Any], format: str) -> list[str]:
    """What is wrong with the options for this task, one line each."""
    found = [
        f"{name}={str(options[name]).lower()}: is of format={', '.join(formats)}, and this is {format}; give "
        "one of these, or leave it out."
        for name, formats in (("quantize", INT8), ("evaluate", SCORED))
        if options.get(name) and format not in formats
    ]
    if format == WEIGHTS:
        return found + [
            f"{name}={str(options[name]).lower()}: is of no use to format={WEIGHTS}; leave it out."
            for name in ("axes", "bytes")
            if name in options
        ]
    try:
        kind = kind_of(trained)
    except UserError as error:
        return [*found, str(error)]
    given = _of_data(options)
    if given and kind not in TESTED:
        found.append(
            f"{' and '.join(given)}: is of classes, numbers, masks and speech with CTC; leave it out."
        )
    elif given and kind is sound_of_text and (FORMATS[format].single or options.get("axes") == SINGLE):
        found.append(
            f"{' and '.join(given)}: gives the file the run's utterances, and this one takes a second; give "
            "format=onnx and axes=time, or leave it out."
        )
    if FORMATS[format].adapters and not isinstance(trained.source, AdapterSource):
        found.append(
            f"format={format}: writes an adapter beside its base, and none is given; give adapter=PATH."
        )
    allowed = (SINGLE,) if FORMATS[format].single else AXES[kind]
    if (axes := options.get("axes")) is not None and axes not in allowed:
        why = f"format={format}" if axes in AXES[kind] else "this task"
        found.append(f"axes={axes}: give {' or '.join(allowed)} with {why}.")
    if options.get("bytes") and kind is sound_of_text:
        found.append("bytes=true: is of pictures; leave it out.")
    return found
