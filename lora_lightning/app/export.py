"""`lora-lightning export`: what was trained as a file that other programs run, with its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_lightning.app.base_names import base_of_origin
from lora_lightning.app.card import results_of
from lora_lightning.app.export_tasks import AXES, SINGLE, Given, kind_of, size_problem, sound_of_text
from lora_lightning.app.loading_lines import loading_lines, plain_network
from lora_lightning.app.rebuild import compression_of
from lora_lightning.app.trained import Trained, named
from lora_lightning.app.upload import card_of
from lora_lightning.errors import UserError
from lora_lightning.exporting.card import ExportCard
from lora_lightning.exporting.export import export as export_model
from lora_lightning.exporting.folder import folder_problem
from lora_lightning.exporting.formats import FORMATS
from lora_lightning.files.locate import AdapterSource
from lora_lightning.files.origin import Origin

WEIGHTS = "safetensors"
UNKNOWN = "–"  # how a score without a value is shown


def export(options: Mapping[str, Any], words: Sequence[str]) -> str:
    """Export what was trained, or a recipe's base.

    Args:
        options: of the command `export`, by name.
        words: `recipe=NAME key=value …`; none takes the run that the adapter or checkpoint lies in, or what
            came with it.

    Returns:
        What was written, in a few lines.

    Raises:
        UserError: every mistake in one message, before the model is built; or it cannot be exported so.
        WriteError: the folder cannot be written.
    """
    out, format = Path(options["out"]).expanduser(), options.get("format", "onnx")
    problems = [p for p in [folder_problem(out, bool(options.get("overwrite")))] if p]
    trained = named(options, words, problems)
    if trained:
        problems += _problems(trained, options, format)
    if problems or trained is None:
        raise UserError("\n".join(problems))
    model, facts = trained.model(options.get("check_base", True), merged=not FORMATS[format].adapters)
    if problem := size_problem(model, options.get("axes", "")):
        raise UserError(problem)
    if format == WEIGHTS:
        given = Given(plain_network(model), None)
    else:
        kind = kind_of(trained)
        usual = SINGLE if FORMATS[format].single else AXES[kind][0]
        given = kind(trained, model, facts, options.get("axes", usual))
    told = export_model(
        given.model, given.example, out,
        format=format, dynamic=given.dynamic, preprocess=given.preprocess, inside=bool(options.get("bytes")),
        names=given.names, kind=given.kind, scale=given.scale, check=given.check,
        about=_card(trained, model, facts, FORMATS[format].adapters),
        overwrite=bool(options.get("overwrite")),
    )  # fmt: skip
    return str(told)


def _problems(trained: Trained, options: Mapping[str, Any], format: str) -> list[str]:
    """What is wrong with the options for this task, one line each."""
    if format == WEIGHTS:
        return [
            f"{name}={str(options[name]).lower()}: is of no use to format={WEIGHTS}; leave it out."
            for name in ("axes", "bytes")
            if name in options
        ]
    try:
        kind = kind_of(trained)
    except UserError as error:
        return [str(error)]
    found = []
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


def _card(trained: Trained, model: nn.Module, facts: Mapping[str, Any], beside: bool) -> ExportCard:
    """What is known of the model, where it comes from and how good it is.

    Args:
        beside: the adapter is in a file of its own.
    """
    source, kind = trained.source, type(model).__name__
    origin, _ = Origin(config=dict(trained.config), facts=dict(facts)).public()
    base = base_of_origin(origin.config, kind)
    rows = [("base", base.name), ("base's licence", base.licence or "not known here: see its source")]
    results: tuple[tuple[str, ...], ...] = ()
    title, summary = base.name, "The base as it is, without an adapter."
    if isinstance(source, AdapterSource):
        card = card_of(source, source.origin().public()[0])
        title = f"{card.name} on {base.name}"
        purpose = f" for {card.kind.words}" if card.kind else ""
        where = "in a file of its own" if beside else "that is a part of its weights"
        summary = f"{base.name}, adapted by a low-rank adapter {where}{purpose}."
        rows += [("trained by", card.recipe), ("data", card.data)]
        header, scores = results_of(card)
        if not beside:  # what has no value before is of an adapter that is switched off
            scores = [row for row in scores if row[1] != UNKNOWN]
        results = (header, *scores) if scores else ()
    elif source:
        title, summary = f"{source.recipe() or kind} on {base.name}", f"{base.name}, with weights of its own."
    names = facts.get("class_names") or ()
    rows += [("classes", str(len(names)) if names else "")]
    lines = loading_lines(origin.config.get("model") or {}, facts)
    if source and (description := compression_of(source)):
        rows.append(("compressed", f"{len(description['layers'])} layers are smaller ones"))
        lines = ""  # the library builds the whole model
    return ExportCard(title, summary, tuple(row for row in rows if row[1]), results, lines)
