"""What trackers are shown of a tested detector: pictures with boxes, the truth, before and after."""

from __future__ import annotations

from collections.abc import Sequence

from lora_lightning.tasks.detection_pictures import Example as Examined
from lora_lightning.tasks.detection_pictures import judge, views_of
from lora_lightning.tasks.examples import all_framed
from lora_lightning.trainer.trackers.tracker import Example
from lora_lightning.utils.plurals import counted


def examples_of(first: Sequence[Examined], names: Sequence[str], threshold: float) -> list[Example]:
    """The first test images.

    Args:
        first: as they were seen.
        threshold: the least score of a prediction that counts.
    """
    return [_example(one.confident(threshold), index, names) for index, one in enumerate(first)]


def _example(one: Examined, index: int, names: Sequence[str]) -> Example:
    objects = len(one.truth["labels"])
    words = {"truth": counted(objects, "object")}
    for state, prediction in one.found.items():
        verdict = judge(prediction, one.truth)
        right, missed = verdict.right.count(True), verdict.found.count(False)
        words[state] = f"{right} right, {len(verdict.right) - right} wrong, {missed} missed"
    return Example(f"test image {index}", words, all_framed(views_of(one, names)))
