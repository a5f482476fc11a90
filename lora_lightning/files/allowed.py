"""What may be built because a file says so: models and data of this package by name, with plain options.

A run's folder, a checkpoint or an adapter may come from anyone, so nothing in it chooses code: names are
compared with the lists below, and everything else that could call something is refused before any import.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lora_lightning.errors import UserError
from lora_lightning.utils.tables import truncate_list

# By the section of the configuration; `_target_`s of `conf/` are the same, which a test compares.
BUILDERS: dict[str, tuple[str, ...]] = {
    "model": (
        "lora_lightning.models.ctc.conformer_ctc",
        "lora_lightning.models.detection.detector",
        "lora_lightning.models.rtdetr.rtdetr",
        "lora_lightning.models.segmentation.segmenter",
        "lora_lightning.models.speech.pretrained_recognizer",
        "lora_lightning.models.timm.timm_model",
        "lora_lightning.models.timm_segmentation.timm_segmenter",
        "lora_lightning.models.torchvision.torchvision_model",
        "lora_lightning.models.transducer.conformer_transducer",
        "lora_lightning.models.whisper.whisper",
    ),
    "data": (
        "lora_lightning.data.accents.AccentsDataModule",
        "lora_lightning.data.coco.CocoDataModule",
        "lora_lightning.data.coco.CocoFormatDataModule",
        "lora_lightning.data.digits.DigitsDataModule",
        "lora_lightning.data.image_folder.ImageFolderDataModule",
        "lora_lightning.data.masks.MasksDataModule",
        "lora_lightning.data.named_sets.NamedSetDataModule",
        "lora_lightning.data.pennfudan.PennFudanDataModule",
        "lora_lightning.data.recordings.RecordingsDataModule",
        "lora_lightning.data.shapes.ShapesDataModule",
        "lora_lightning.data.stream.StreamDataModule",
        "lora_lightning.data.voc.VOCDataModule",
    ),
    "task": (
        "lora_lightning.tasks.classification.ImageClassifier",
        "lora_lightning.tasks.ctc.SpeechRecognizer",
        "lora_lightning.tasks.detection.ObjectDetector",
        "lora_lightning.tasks.segmentation.SemanticSegmenter",
        "lora_lightning.tasks.seq2seq.Seq2SeqRecognizer",
        "lora_lightning.tasks.transducer.TransducerRecognizer",
    ),
}
TARGET = "_target_"
WRITTEN = "Give the file as the run wrote it."
RESERVED = (TARGET, "_args_", "_partial_", "_recursive_", "_convert_")  # what Hydra's instantiate obeys
LARGEST_PICTURE = 8192  # pixels of a side, which a file may ask to be made of every picture


def _is_number(value: Any, least: float = -math.inf) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > least


def _all(kind: Callable[[Any], bool], count: int | None = None) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and all(map(kind, v)) and count in (None, len(v))


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_PICTURE


_WORDS = ("a list of words", _all(lambda v: isinstance(v, str)))
_NUMBERS = ("a list of numbers", _all(_is_number))
_POSITIVE = ("a number above 0", lambda v: _is_number(v, 0))
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
# What the facts that the application itself reads may be, in words and as a test.
FACTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_classes": ("a whole number", lambda v: type(v) is int),
    "class_names": _WORDS,
    "vocabulary": _WORDS,
    "kept": _WORDS,
    "category_ids": ("a list of whole numbers", _all(lambda v: type(v) is int)),
    "target": ("class, classes or number", lambda v: v in ("class", "classes", "number")),
    "number_mean": ("a number", _is_number),
    "number_std": _POSITIVE,
    "class_weights": _NUMBERS,
    "logit_adjustment": _NUMBERS,
    "temperature": _POSITIVE,
    "input_size": (f"three numbers of 1 to {LARGEST_PICTURE}", _all(_is_size, 3)),
    "mean": ("three numbers", _all(_is_number, 3)),
    "std": ("three numbers above 0", _all(lambda v: _is_number(v, 0), 3)),
    "interpolation": (f"one of {', '.join(INTERPOLATIONS)}", lambda v: v in INTERPOLATIONS),
    "crop_pct": ("a number above 0, at most 1", lambda v: _is_number(v, 0) and v <= 1),
    "palette": ("a list of whole numbers from 0 to 255", _all(lambda v: type(v) is int and 0 <= v <= 255)),
    "shorter_side": (f"null, or 1 to {LARGEST_PICTURE}", lambda v: v is None or _is_size(v)),
    "crop_mode": ("center, squash or border", lambda v: v in ("center", "squash", "border")),
}
REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}", re.ASCII)
MOST, DEEPEST = 100_000, 40  # values of a configuration, and levels: references can repeat them without end


def section_of(config: Mapping[str, Any], section: str, where: object) -> tuple[str, dict[str, Any]]:
    """What a section of a file's configuration builds: the builder's name and its options, all plain.

    References to other values of the file are followed first. Nothing is imported, built or evaluated.

    Args:
        config: as read from the file.
        section: a key of BUILDERS.
        where: the file or folder, for errors.

    Raises:
        UserError: it names something else than a builder of that section, anywhere within.
    """
    target = target_of(config, section, where)
    options = {k: v for k, v in plain_values(config, section, where).items() if k != TARGET}
    if found := calls(options, section):
        raise UserError(_unasked(found, where))
    return target, options


def target_of(config: Mapping[str, Any], section: str, where: object) -> str:
    """The name of what a section of a file's configuration builds.

    Raises:
        UserError: it is none of BUILDERS.
    """
    node = plain_values(config, section, where)
    if not isinstance(node, dict) or TARGET not in node:
        raise UserError(
            f"{where}: {section}={_brief(node)}: {section}.{TARGET} does not say what is built. {WRITTEN}"
        )
    if node[TARGET] not in BUILDERS[section]:
        raise UserError(_unasked([f"{section}.{TARGET}={_brief(node[TARGET])}"], where))
    return node[TARGET]


def _unasked(found: list[str], where: object) -> str:
    return (
        f"{where}: {truncate_list(found)} is not run unasked: a file has models and data of this package "
        "built, "
        "from plain options, and nothing else. Build the base yourself: base=FILE.safetensors for merge, "
        "recipe=NAME for predict and transcribe."
    )


def calls(node: Any, path: str, allowed: Collection[str] = (), keys: Collection[str] = RESERVED) -> list[str]:
    """`model.size._target_=os.system` for each key that has something called, at any depth, and in lists.

    Args:
        node: plain values.
        path: of the node.
        allowed: targets that may be named; what Hydra obeys may then stand beside them.
        keys: by default Hydra's.
    """
    if isinstance(node, Mapping):
        known = isinstance(node.get(TARGET), str) and node[TARGET] in allowed
        return [
            line
            for key, value in node.items()
            for here in [f"{path}.{key}".lstrip(".")]
            for line in ([] if known or key not in keys else [f"{here}={_brief(value)}"])
            + calls(value, here, allowed, keys)
        ]
    if isinstance(node, (list, tuple)):
        return [line for i, value in enumerate(node) for line in calls(value, f"{path}.{i}", allowed, keys)]
    return []


def checked_facts(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """What data said of themselves, from a file: numbers, words and lists of them.

    Raises:
        UserError: a fact is of another kind, or would call something.
    """
    facts = {str(name): plain_values(values, name, where) for name in values}
    nested = [
        f"{name}={_brief(value)}"
        for name, value in facts.items()
        if any(isinstance(v, (dict, list)) for v in (value if isinstance(value, list) else [value]))
    ]
    if found := calls(facts, "") or nested:
        raise UserError(
            f"{where}: {truncate_list(found)} is not run unasked: what data said of themselves are "
            f"numbers, words and lists of them. {WRITTEN}"
        )
    for name, (wanted, test) in FACTS.items():
        if name in facts and not test(facts[name]):
            raise UserError(
                f"{where}: {name}={_brief(facts[name])}: the file is damaged: this is {wanted}. {WRITTEN}"
            )
    return facts


def plain_values(values: Mapping[str, Any], key: Any, where: object) -> Any:
    """One value of a file with every reference in it, such as `${model.name}`, followed.

    Raises:
        UserError: a reference that leads nowhere, in a circle or to a resolver, which is not evaluated;
            a value of another kind than YAML's plain ones; more than MOST values.
    """
    return _Resolving(values, where).of(values.get(key), str(key), ())


class _Resolving:
    """Follows the references in a file's values; counts, so that few lines cannot grow without end."""

    def __init__(self, root: Mapping[str, Any], where: object) -> None:
        self.root, self.where, self.count = root, where, 0

    def of(self, node: Any, path: str, through: tuple[str, ...]) -> Any:
        self.count += 1
        if self.count > MOST or path.count(".") + len(through) > DEEPEST:
            raise UserError(f"{self.where}: {_brief(path)}: holds too much for a configuration. {WRITTEN}")
        if isinstance(node, Mapping):
            return {self._key(k, path): self.of(v, f"{path}.{k}", through) for k, v in node.items()}
        if isinstance(node, list):
            return [self.of(v, f"{path}.{i}", through) for i, v in enumerate(node)]
        if isinstance(node, str):
            return self._text(node, path, through) if "${" in node else node
        if node is None or isinstance(node, (bool, int, float)):
            return node
        raise UserError(f"{self.where}: {path}: is a {type(node).__name__}, no plain value. {WRITTEN}")

    def _key(self, key: Any, path: str) -> str | int:
        if isinstance(key, (str, int)):
            return key
        raise UserError(
            f"{self.where}: {path}: has a {type(key).__name__} as a key, which is no word. {WRITTEN}"
        )

    def _text(self, text: str, path: str, through: tuple[str, ...]) -> Any:
        if "${" in REFERENCE.sub("", text):
            raise UserError(
                f"{self.where}: {path}={_brief(text)}: is not evaluated: in a file, ${{NAME}} may name "
                "another value of the same file, and nothing else."
            )
        if whole := REFERENCE.fullmatch(text):
            return self._at(whole[1], path, through)
        return REFERENCE.sub(lambda found: str(self._at(found[1], path, through)), text)

    def _at(self, name: str, path: str, through: tuple[str, ...]) -> Any:
        node: Any = self.root
        for part in name.split("."):
            if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, Mapping) and part in node:
                node = node[part]
            else:
                raise UserError(
                    f"{self.where}: {path}: refers to {name}, which the file does not have. {WRITTEN}"
                )
        if name in through:
            raise UserError(f"{self.where}: {path}: refers to itself by {' and '.join(through)}. {WRITTEN}")
        return self.of(node, path, (*through, name))


def _brief(value: Any) -> str:
    text = " ".join(str(value).split())
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else f"{text[:77]}..."
