"""What trackers are shown of a tested detector: pictures with boxes, the truth, before and after."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import nn

from lora_lightning.tasks.detection_pictures import Example as Examined
from lora_lightning.tasks.detection_pictures import examined, judge, views_of
from lora_lightning.tasks.examples import all_framed
from lora_lightning.trainer.trackers.tracker import Example
from lora_lightning.utils.plurals import counted


def examples_of(
    model: nn.Module,
    data: L.LightningDataModule,
    names: Sequence[str],
    threshold: float,
    most: int,
    now: str,
) -> list[Example]:
    """The first test images.

    Args:
        model: images -> predictions, with the trained weights.
        threshold: the least score of a prediction that counts.
        most: images.
        now: the word for the model as it is.
    """
    found = examined(model, data, threshold, most, now)[:most]
    return [_example(one, index, names) for index, one in enumerate(found)]


def _example(one: Examined, index: int, names: Sequence[str]) -> Example:
    objects = len(one.truth["labels"])
    words = {"truth": counted(objects, "object")}
    for state, prediction in one.found.items():
        verdict = judge(prediction, one.truth)
        right, missed = verdict.right.count(True), verdict.found.count(False)
        words[state] = f"{right} right, {len(verdict.right) - right} wrong, {missed} missed"
    return Example(f"test image {index}", words, all_framed(views_of(one, names)))
