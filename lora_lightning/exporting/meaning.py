"""What goes into an exported model and what comes out, as data beside it: preprocess.json, names.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lora_lightning.errors import did_you_mean
from lora_lightning.utils.marks import is_number, is_whole

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
SCALES: dict[str, dict[str, float]] = {  # of the kinds that have one: what it is where nobody says
    "class": {"temperature": 1.0},
    "classes": {"temperature": 1.0},
    "number": {"mean": 0.0, "std": 1.0},
}
SCALE_IS = "give a mapping, of logits {'temperature': 1.0}, of a number its mean and std."
SHAPES = {"class": (2, 1), "classes": (2, 1), "number": (2, 1), "masks": (4, 1), "text": (3, 2)}
NAMED = ("class", "classes", "masks", "text", "boxes")  # kinds of which run.py tells names


def meaning_problems(
    names: Sequence[str] | None,
    kind: str | None,
    preprocess: Mapping[str, Any] | None,
    inside: bool,
    scale: Mapping[str, float] | None,
) -> list[str]:
    """What is wrong with these options of `export`, one line each."""
    found = []
    if kind is not None and kind not in KINDS:
        found.append(f"kind={kind!r}: give one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    if names is not None:
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            found.append(f"names={names!r}: give a list of words.")
    elif kind in NAMED:
        found.append(f"kind={kind!r}: give names, by which run.py tells what comes out.")
    found += [*_of_preprocess(preprocess), *_of_scale(scale, kind)]
    if inside is True and not is_pictures(preprocess):
        found.append("inside=True: give preprocess, with mean and std of pictures.")
    return found


def _of_preprocess(given: Mapping[str, Any] | None) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        return [f"preprocess={given!r}: give a mapping with mean and std, or with {SOUND}."]
    try:
        json.dumps(dict(given), allow_nan=False)
    except (TypeError, ValueError) as error:
        return [f"preprocess: {error}: give plain numbers, words and lists."]
    if SOUND in given:
        rate = given[SOUND]
        good = is_whole(rate) and rate > 0
        return [] if good else [f"preprocess: {SOUND}={rate!r}: give samples a second, such as 16000."]
    lacking = [name for name in PICTURES if name not in given]
    if lacking:
        return [f"preprocess: give mean and std of pictures, or {SOUND} of sound; {lacking[0]} is missing."]
    for name in PICTURES:
        if not isinstance(given[name], (list, tuple)) or not all(map(is_number, given[name])):
            return [f"preprocess: {name}={given[name]!r}: give a list of numbers, one for each channel."]
    if (means := len(given["mean"])) != (deviations := len(given["std"])):
        return [f"preprocess: mean has {means} numbers and std {deviations}: give as many."]
    if not all(value > 0 for value in given["std"]):
        return [f"preprocess: std={given['std']!r}: give numbers above 0."]
    return []


def _of_scale(given: Mapping[str, float] | None, kind: str | None) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        return [f"scale={given!r}: {SCALE_IS}"]
    known = SCALES.get(kind or "", {})
    if given and not known:
        return [f"scale: an output of kind={kind!r} has none: leave it out."]
    found = []
    for name, value in given.items():
        if name not in known:
            near = did_you_mean(name, known)
            found.append(f"scale: an output of kind={kind!r} has no {name!r}.{near} Give {', '.join(known)}.")
        elif not is_number(value) or (name != "mean" and value <= 0):
            found.append(f"scale: {name}={value!r}: give a number{'' if name == 'mean' else ' above 0'}.")
    return found


def misfit(kind: str | None, names: Sequence[str] | None, outputs: Sequence[Tensor] | None) -> str | None:
    """Why outputs are not what `kind` and `names` say, or None.

    Args:
        outputs: an example; None where there is none.
    """
    if kind not in SHAPES or outputs is None:
        return None
    axes, axis, shape = *SHAPES[kind], tuple(outputs[0].shape)
    if len(shape) != axes or (kind == "text" and len(outputs) < 2):
        lengths = ", and how many frames are theirs" if kind == "text" else ""
        return f"kind={kind!r}: is of outputs with {axes} axes{lengths}, and these are {shape}: give another."
    if kind == "number" and shape[axis] > 1:
        return f"kind='number': is of one for each input, and these are {shape}: give another, or none."
    if names is not None and len(names) != shape[axis]:
        return f"names: {len(names)} for an output of {shape[axis]} on axis {axis}: give as many."
    return None


def is_pictures(preprocess: Mapping[str, Any] | None) -> bool:
    """Whether what goes in is pictures."""
    return isinstance(preprocess, Mapping) and all(name in preprocess for name in PICTURES)
