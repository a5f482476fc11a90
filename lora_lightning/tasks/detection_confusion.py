"""What a test of a detector gave: scores, intervals, and what it takes for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_lightning.tasks.average_precision import AveragePrecision, class_precisions, scores_of
from lora_lightning.tasks.bootstrap import Array
from lora_lightning.tasks.detection_bootstrap import overlaps_of, precision_intervals

LEAST = 0.5  # intersection over union of a prediction and the object that it is of
BACKGROUND = "background"


@dataclass(frozen=True)
class Detections:
    """Of all images of a test.

    Attributes:
        images: how many.
        scores, intervals: by name; intervals of some.
        taken_for: the confusions, as of that function.
        precisions: as of `class_precisions`, of "boxes" and perhaps of "masks".
        objects: (classes,), how many there are.
    """

    images: int
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    taken_for: Array
    precisions: Mapping[str, Array]
    objects: Array


def detections_of(precision: AveragePrecision, names: Sequence[str], threshold: float) -> Detections:
    """What a metric with curves has gathered, which is reset.

    Args:
        names: of the classes.
        threshold: the least score of a prediction that counts among the confusions.
    """
    computed, classes = precision.compute(), len(names)
    parts = {"boxes": "bbox_", "masks": "segm_"} if "bbox_map" in computed else {"boxes": ""}
    truths = [np.asarray(labels) for labels in precision.metric_state["groundtruth_labels"]]
    found = Detections(
        len(truths),
        scores_of(computed, names),
        precision_intervals(precision),
        taken_for(precision, classes, threshold),
        {kind: class_precisions(computed, classes, part) for kind, part in parts.items()},
        np.bincount(np.concatenate([*truths, np.zeros(0, int)]) - 1, minlength=classes),
    )
    precision.reset()
    return found


def taken_for(precision: AveragePrecision, classes: int, threshold: float) -> Array:
    """(classes + 1, classes + 1): how many objects of each class, a row, were found as each, a column. The
    last is the background: its row is what was found where nothing is, its column what was missed.

    The surest first, a prediction takes the free object of its class that it overlaps most, and then, of
    those that are left, one of any class; one that lies on a crowd alone does not count.

    Args:
        precision: after `compute`, and before `reset`.
        classes: how many there are.
        threshold: the least score of a prediction that counts.
    """
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    state = precision.metric_state
    columns = ("groundtruth_labels", "groundtruth_crowds", "detection_labels", "detection_scores")
    for overlap, *rest in zip(overlaps_of(precision), *(state[name] for name in columns), strict=True):
        truths, crowds, said = (np.asarray(one) for one in rest[:3])
        scores = rest[3].float().numpy()  # numpy has no bfloat16
        sure = np.flatnonzero(scores >= threshold)
        sure = sure[np.argsort(-scores[sure], kind="stable")]
        crowd = crowds.astype(bool)
        pairs = _pairs(overlap[np.ix_(sure, ~crowd)], said[sure], truths[~crowd])
        on_crowd = (overlap[np.ix_(sure, crowd)] >= LEAST).any(1)
        free = np.ones((~crowd).sum(), bool)
        for row, place in enumerate(pairs):
            if place is not None:
                counts[truths[~crowd][place] - 1, said[sure[row]] - 1] += 1
                free[place] = False
            elif not on_crowd[row]:
                counts[-1, said[sure[row]] - 1] += 1
        np.add.at(counts, (truths[~crowd][free] - 1, -1), 1)
    return counts


def _pairs(overlap: Array, said: Array, truths: Array) -> Sequence[int | None]:
    """The object of each prediction, the surest first; None of one that has none."""
    found: list[int | None] = [None] * len(said)
    free = np.ones(len(truths), bool)
    for same in (True, False):
        for row, label in enumerate(said):
            if found[row] is not None or not len(truths):
                continue
            near = np.where(free & ((truths == label) | (not same)), overlap[row], 0)
            if near.max() >= LEAST:
                found[row] = int(near.argmax())
                free[found[row]] = False
    return found
