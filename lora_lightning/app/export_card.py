"""The card of an exported model: what it is, where it comes from and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_lightning.app.base_names import base_of_origin
from lora_lightning.app.card import results_of
from lora_lightning.app.loading_lines import loading_lines
from lora_lightning.app.rebuild import compression_of
from lora_lightning.app.results import Result
from lora_lightning.app.trained import Trained
from lora_lightning.app.upload import card_of
from lora_lightning.exporting.card import ExportCard
from lora_lightning.files.locate import AdapterSource
from lora_lightning.files.origin import Origin
from lora_lightning.tasks.scores import Score

UNKNOWN = "–"  # how a score without a value is shown


def export_card(
    trained: Trained,
    model: nn.Module,
    facts: Mapping[str, Any],
    beside: bool,
    measured: Sequence[Result] | None,
    shown_by: Sequence[Score] | None,
) -> ExportCard:
    """What is known of the model, where it comes from and how good it is.

    Args:
        beside: the adapter is in a file of its own.
        measured, shown_by: results and scores of a run that has not yet written them.
    """
    source, kind = trained.source, type(model).__name__
    origin, _ = Origin(config=dict(trained.config), facts=dict(facts)).public()
    base = base_of_origin(origin.config, kind)
    rows = [("base", base.name), ("base's licence", base.licence or "not known here: see its source")]
    results: tuple[tuple[str, ...], ...] = ()
    title, summary = base.name, "The base as it is, without an adapter."
    if isinstance(source, AdapterSource):
        card = card_of(source, source.origin().public()[0], results=measured, scores=shown_by)
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
