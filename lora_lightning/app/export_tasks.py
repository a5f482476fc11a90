"""What `lora-lightning export` exports of each kind of task: an example, its axes, preprocessing, names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.utils import get_object
from torch import Tensor, nn

from lora_lightning.app.predict_classes import preprocessing_for
from lora_lightning.app.trained import Trained
from lora_lightning.data.picture_transform import FACTS as SHOWN
from lora_lightning.data.picture_transform import fixed_size
from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.errors import UserError
from lora_lightning.exporting.detection import Detector
from lora_lightning.exporting.subject import BATCH, Example, inputs_of
from lora_lightning.tasks.tellers import names_of

SIDE = 128  # pixels of a picture of masks, where the data say nothing
DRAWN = 8  # pictures, of which those are used in which a detector finds most
SINGLE = "single"  # axes= of one size


@dataclass(frozen=True)
class Given:
    """What `ll.export` is given, by the names of the options."""

    model: nn.Module
    example: Example | None
    dynamic: Mapping[str, Mapping[int, str]] | bool = False
    preprocess: Mapping[str, Any] | None = None
    names: list[str] | None = None
    kind: str | None = None
    scale: Mapping[str, float] = field(default_factory=dict)
    check: list[Example] | None = None


def pictures_of_classes(trained: Trained, model: nn.Module, facts: Mapping[str, Any], axes: str) -> Given:
    """Pictures -> logits, or numbers."""
    shown = {name: value for name, value in preprocessing_for(model, facts, trained).items() if name in SHOWN}
    target = facts.get("target", "class")
    names = None if target == "number" else names_of(facts)
    if target == "number":
        scale = {"mean": facts.get("number_mean", 0.0), "std": facts.get("number_std", 1.0)}
    else:
        scale = {"temperature": facts.get("temperature", 1.0)}
    return Given(model, *_pictures(model, shown, axes), shown, names, target, scale)


def pictures_of_masks(trained: Trained, model: nn.Module, facts: Mapping[str, Any], axes: str) -> Given:
    """Pictures -> the logits of every pixel's class."""
    size = facts.get("shorter_side") or trained.config.get("data", {}).get("crop_size") or SIDE
    shown = {"input_size": [3, size, size], **{k: facts[k] for k in ("mean", "std") if k in facts}}
    known = {"mean", "std"} <= shown.keys()
    names = list(facts.get("class_names", ())) or None
    example, dynamic = _pictures(model, shown, axes)
    return Given(model, example, dynamic, shown if known else None, names, "masks" if names else None)


def sound_of_text(trained: Trained, model: nn.Module, facts: Mapping[str, Any], axes: str) -> Given:
    """Waves and their lengths in samples -> logits of every frame, for CTC."""
    if "vocabulary" not in facts:
        raise UserError(
            f"{trained.where}: its data, which decide the vocabulary, are not here: give recipe=NAME."
        )
    second = SAMPLE_RATE
    names = list(facts["vocabulary"])
    preprocess = {"sample_rate": SAMPLE_RATE, "channels": 1}
    if axes == SINGLE:
        alone, length = _waves(second)
        shorter: list[Example] = [(alone.flip(1), length - second // 3)]
        return Given(model, (alone, length), False, preprocess, names, "text", check=shorter)
    example = _waves(second, 3 * second // 4)
    waves, lengths = inputs_of(model, example)
    dynamic = {waves: {0: BATCH, 1: "samples"}, lengths: {0: BATCH}}
    check: list[Example] = [_waves(5 * second // 4), _waves(3 * second // 4, second // 2, second // 3)]
    return Given(model, example, dynamic, preprocess, names, "text", check=check)


@torch.no_grad()
def picture_of_boxes(trained: Trained, model: nn.Module, facts: Mapping[str, Any], axes: str) -> Given:
    """One picture of one size -> its boxes, labels and scores."""
    if hasattr(model, "roi_heads"):
        raise UserError(
            f"{type(model).__name__} looks again at as many regions as its first stage has found, of "
            "which there is no graph: give format=safetensors, or train a detector of one stage, such as "
            "fcos_small."
        )
    side = _side(model)
    source = torch.Generator().manual_seed(0)
    drawn = [_rectangles(side, source) for _ in range(DRAWN)]
    detector = Detector(model).eval()
    drawn.sort(key=lambda picture: -len(detector(picture)["scores"]))  # what finds nothing compares nothing
    shown = {"input_size": [3, side, side], "mean": [0.0] * 3, "std": [1.0] * 3}
    names = list(facts.get("class_names", ())) or None
    kind = "boxes" if names else None
    return Given(detector, drawn[0], False, shown, names, kind, check=[drawn[1], drawn[2]])


def _side(model: nn.Module) -> int:
    """Pixels of a square picture that a detector does not resize."""
    transform = getattr(model, "transform", None)  # of torchvision
    if fixed := getattr(transform, "fixed_size", None):
        return int(fixed[0])
    return int(getattr(transform, "min_size", (getattr(model, "image_size", 5 * SIDE),))[-1])


def _rectangles(side: int, source: torch.Generator) -> Tensor:
    """A picture (1, 3, side, side) of four plain rectangles on noise."""
    picture = torch.rand(1, 3, side, side, generator=source) / 4
    for _ in range(4):
        top, left = torch.randint(3 * side // 4, (2,), generator=source).tolist()
        height, width = torch.randint(side // 8, side // 3, (2,), generator=source).tolist()
        colour = torch.rand(3, 1, 1, generator=source)
        picture[0, :, top : top + height, left : left + width] = colour
    return picture


def _waves(*lengths: int) -> tuple[Tensor, Tensor]:
    """Noise of these lengths in samples, the longest first."""
    source = torch.Generator().manual_seed(len(lengths))
    return 0.1 * torch.randn(len(lengths), lengths[0], generator=source), torch.tensor(lengths)


def _pictures(
    model: nn.Module, shown: Mapping[str, Any], axes: str
) -> tuple[Tensor, Mapping[str, Mapping[int, str]] | bool]:
    """An example of pictures and its dynamic axes."""
    channels, height, width = shown["input_size"]
    source = torch.Generator().manual_seed(0)
    example = torch.randn(2, channels, height, width, generator=source)
    if axes == SINGLE:
        return example[:1], False
    (name,) = inputs_of(model, example)
    return example, {name: {0: BATCH, **({2: "height", 3: "width"} if axes == "size" else {})}}


Kind = Callable[[Trained, nn.Module, Mapping[str, Any], str], Given]
TASKS = "lora_lightning.tasks"
LOOPS = (f"{TASKS}.seq2seq.Seq2SeqRecognizer", f"{TASKS}.transducer.TransducerRecognizer")
KINDS: dict[str, Kind] = {  # by the class of the task, where it is none of LOOPS
    f"{TASKS}.classification.ImageClassifier": pictures_of_classes,
    f"{TASKS}.segmentation.SemanticSegmenter": pictures_of_masks,
    f"{TASKS}.detection.ObjectDetector": picture_of_boxes,
    f"{TASKS}.ctc.SpeechRecognizer": sound_of_text,
}
AXES: dict[Kind, tuple[str, ...]] = {  # what the file of each kind leaves open; first what is taken
    pictures_of_classes: ("batch", "size", SINGLE),
    pictures_of_masks: ("batch", "size", SINGLE),
    picture_of_boxes: (SINGLE,),
    sound_of_text: ("time", SINGLE),
}


def kind_of(trained: Trained) -> Kind:
    """What makes the example, by the task.

    Raises:
        UserError: it is of a kind that no graph computes.
    """
    target = trained.config["task"]["_target_"]
    task = get_object(target)
    if isinstance(task, type) and not issubclass(task, tuple(map(get_object, LOOPS))):
        for name, kind in KINDS.items():
            if issubclass(task, get_object(name)):
                return kind
    name = target.rpartition(".")[2]
    raise UserError(
        f"{name} writes one symbol after the other, in a loop, of which there is no graph: give "
        "format=safetensors, for the library of the model."
    )


def size_problem(model: nn.Module, axes: str) -> str | None:
    """Why pictures of other sizes do not go into a model, if they do not."""
    size = fixed_size(model)
    if axes != "size" or size is None:
        return None
    return f"axes=size: {type(model).__name__} takes {size[0]} x {size[1]} pixels alone; leave it out."
