"""Which data and models of this package go with which of its tasks; classes of the user's own are free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lightning.utils.marks import is_number

PACKAGE = "lora_lightning."
TASKS = {  # of the group `task`: what it is about
    "tasks.classification.ImageClassifier": "classification",
    "tasks.detection.ObjectDetector": "detection",
    "tasks.ctc.SpeechRecognizer": "ctc",
    "tasks.seq2seq.Seq2SeqRecognizer": "seq2seq",
    "tasks.transducer.TransducerRecognizer": "transducer",
}
SPEECH = ("ctc", "seq2seq", "transducer")
FITTING = {  # the tasks that a data module or a model is for
    "data.digits.DigitsDataModule": ("classification",),
    "data.image_folder.ImageFolderDataModule": ("classification",),
    "data.named_sets.NamedSetDataModule": ("classification",),
    "data.stream.StreamDataModule": ("classification",),
    "data.shapes.ShapesDataModule": ("detection",),
    "data.coco.CocoDataModule": ("detection",),
    "data.coco.CocoFormatDataModule": ("detection",),
    "data.voc.VOCDataModule": ("detection",),
    "data.pennfudan.PennFudanDataModule": ("detection",),
    "data.accents.AccentsDataModule": SPEECH,
    "data.recordings.RecordingsDataModule": SPEECH,
    "models.timm.timm_model": ("classification",),
    "models.torchvision.torchvision_model": ("classification",),
    "models.detection.detector": ("detection",),
    "models.rtdetr.rtdetr": ("detection",),
    "models.ctc.conformer_ctc": ("ctc",),
    "models.speech.pretrained_recognizer": ("ctc",),
    "models.whisper.whisper": ("seq2seq",),
    "models.transducer.conformer_transducer": ("transducer",),
}
RECIPES = {
    "classification": "vit_digits",
    "detection": "fcos_shapes",
    "ctc": "accent_espeak",
    "seq2seq": "whisper_manifest",
}


def mismatches(values: Mapping[str, Any]) -> list[str]:
    """One line for the data and one for the model, where they are for another task than the configured."""
    task = TASKS.get(_target(values, "task"))
    problems = []
    for section in ("data", "model"):
        target = _target(values, section)
        fitting = FITTING.get(target)
        if task and fitting and task not in fitting:
            name = target.rpartition(".")[2]
            recipe = next((f", or begin with recipe={RECIPES[t]}" for t in fitting if t in RECIPES), "")
            problems.append(
                f"{section}._target_={PACKAGE}{target}: {name} is for task={' or task='.join(fitting)},"
                f" and the task is {task}. Give another {section}={recipe}."
            )
    return problems + _unheard(values)


def _unheard(values: Mapping[str, Any]) -> list[str]:
    """A line where recordings may be longer than what Whisper hears of them."""
    if _target(values, "model") != "models.whisper.whisper":
        return []
    heard, longest = (values.get(a, {}).get(b) for a, b in (("model", "seconds"), ("data", "max_seconds")))
    if not (is_number(heard) and is_number(longest) and longest > heard):
        return []
    return [
        f"data.max_seconds={longest:g}: Whisper hears model.seconds={heard} of a recording. Give at most "
        f"data.max_seconds={heard}" + (", or model.seconds up to 30." if heard < 30 else ".")
    ]


def _target(values: Mapping[str, Any], section: str) -> str:
    node = values.get(section)
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return target.removeprefix(PACKAGE) if isinstance(target, str) else ""
