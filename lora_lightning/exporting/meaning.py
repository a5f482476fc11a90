"""What goes into an exported model and what comes out, as data beside it: preprocess.json, names.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.errors import did_you_mean

KINDS = {  # of outputs: in words
    "class": "logits of classes, of which an input has one",
    "classes": "logits of classes, of which an input has any number",
    "number": "a number, standardized",
    "masks": "logits of the class of every pixel",
    "text": "logits of symbols in each frame, for CTC: the first is the blank",
    "boxes": "boxes with labels and scores",
}
PICTURES = ("mean", "std")  # what preprocessing of pictures has
SOUND = "sample_rate"


def meaning_problems(
    names: Sequence[str] | None, kind: str | None, preprocess: Mapping[str, Any] | None, inside: bool
) -> list[str]:
    """What is wrong with these options of `export`, one line each."""
    found = []
    if kind is not None and kind not in KINDS:
        found.append(f"kind={kind!r}: give one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
        found.append(f"names={names!r}: give a list of words.")
    if preprocess is not None:
        lacking = [name for name in PICTURES if name not in preprocess]
        if SOUND not in preprocess and lacking:
            found.append(
                f"preprocess: give mean and std of pictures, or {SOUND} of sound; {lacking[0]} is missing."
            )
        if SOUND not in preprocess and not lacking:
            counts = {name: len(preprocess[name]) for name in PICTURES}
            if len({*counts.values()}) > 1:
                found.append(
                    f"preprocess: mean has {counts['mean']} numbers and std {counts['std']}: give as many."
                )
    if inside and not (preprocess is not None and all(name in preprocess for name in PICTURES)):
        found.append("inside=True: give preprocess, with mean and std of pictures.")
    return found


def is_pictures(preprocess: Mapping[str, Any] | None) -> bool:
    """Whether what goes in is pictures."""
    return preprocess is not None and all(name in preprocess for name in PICTURES)
