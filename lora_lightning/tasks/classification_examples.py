"""What trackers are shown of a tested classifier: its confusions, and pictures with what it said of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from lora_lightning.tasks.classification_pictures import chosen, shown
from lora_lightning.tasks.classification_tables import confusion_matrix
from lora_lightning.tasks.examples import framed
from lora_lightning.tasks.predictions import Predictions
from lora_lightning.trainer.trackers.tracker import Confusion, Example


def confusion_of(found: Predictions, names: Sequence[str]) -> Confusion | None:
    """Of pictures of one class each."""
    if found.target != "class":
        return None
    return Confusion(names, confusion_matrix(found).tolist())


def examples_of(found: Predictions, names: Sequence[str], data: Any, most: int) -> list[Example]:
    """Pictures of each kind in turn: mistakes, what was mended, what was spoiled.

    Args:
        data: its `show` gives the pictures; without it there are none.
        most: of them.
    """
    turns = chain.from_iterable(zip_longest(*chosen(found).values()))
    examples: list[Example] = []
    for index in (i for i in turns if i is not None):
        name, picture = shown(data, index)
        if picture is not None and len(examples) < most:
            words = {state: said(one, names, index) for state, one in found.states().items()}
            truth = true_words(found, names, index)
            examples.append(Example(name, {"truth": truth, **words}, {"picture": framed(picture)}))
    return examples


def true_words(found: Predictions, names: Sequence[str], index: int) -> str:
    """What a picture is."""
    truth = found.truths[index]
    if found.target == "number":
        return f"{float(truth):.4g}"
    if found.target == "class":
        return names[int(truth)]
    return ", ".join(names[i] for i in truth.nonzero()[:, 0].tolist()) or "none"


def said(found: Predictions, names: Sequence[str], index: int) -> str:
    """What was predicted, with its probability: `dog 0.93`."""
    if found.target == "number":
        return f"{float(found.predicted[index]):.4g}"
    probabilities = found.probabilities_of(index)
    if found.target == "class":
        best = int(found.predicted[index])
        return f"{names[best]} {float(probabilities[best]):.2f}"
    kept = found.predicted[index].nonzero()[:, 0].tolist()
    return ", ".join(f"{names[i]} {float(probabilities[i]):.2f}" for i in kept) or "none"
