"""Bootstrap intervals of COCO's mean average precision: boxes are matched once, and pictures drawn again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lora_lightning.tasks.average_precision import AveragePrecision
from lora_lightning.tasks.bootstrap import BLOCK, RESAMPLES, Array, intervals
from lora_lightning.utils.libraries import loading

with loading("torchvision"):
    from torchvision.ops import box_convert, box_iou

IOUS = np.linspace(0.5, 0.95, 10)
MOST = 100  # predictions of a class in an image, the surest, as COCO counts
LEAST = 100  # resamples, without which there is no interval
WORK = 5_000_000_000  # resamples × predictions: half a minute
CLOSE = 1e-9  # to a threshold of recall


@dataclass(frozen=True)
class Matched:
    """The predictions of a class in all images, the surest first, and its objects.

    Attributes:
        images: (predictions,), the place of each one's image.
        right: (IoUs, predictions), whether it found an object.
        counts: (IoUs, predictions), whether it counts; not where it lies on a crowd.
        objects: (images,), how many there are to find.
    """

    images: Array
    right: Array
    counts: Array
    objects: Array


def precision_intervals(
    precision: AveragePrecision, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float]]:
    """The 95 % intervals of `map` and `map_50` of boxes by the bootstrap over images; none where there is
    nothing to find, or where it would take minutes.

    Args:
        precision: after `compute`, and before `reset`.
    """
    matched = matches_of(precision)
    predictions = sum(len(one.images) for one in matched)
    resamples = min(resamples, WORK // max(1, predictions))
    if not matched or resamples < LEAST:
        return {}
    bounds = intervals(lambda counts: means_of(matched, counts), len(precision.images), resamples)
    return {
        name: (float(low), float(high)) for name, (low, high) in zip(("map", "map_50"), bounds, strict=True)
    }


def means_of(matched: list[Matched], counts: Array) -> Array:
    """(resamples, 2): the mean average precision over classes and IoUs, and that at an IoU of 0.5, of images
    that count so often, (resamples, images)."""
    each = np.stack([_precisions(one, counts) for one in matched], axis=2)  # (resamples, IoUs, classes)
    with np.errstate(invalid="ignore"):  # a resample may have no object of a class
        known = (~np.isnan(each)).sum(2)
        of_iou = np.nansum(each, 2) / known
    return np.stack([of_iou.mean(1), of_iou[:, 0]], axis=1)


def _precisions(one: Matched, counts: Array) -> Array:
    """(resamples, IoUs): the average precision of a class over 101 recalls; NaN without objects."""
    rows = max(1, BLOCK // max(1, len(one.images)))
    if len(counts) > rows:
        parts = [_precisions(one, counts[first : first + rows]) for first in range(0, len(counts), rows)]
        return np.concatenate(parts)
    objects = counts @ one.objects
    weights = counts[:, one.images]  # (resamples, predictions)
    found = np.empty((len(counts), len(IOUS)))
    for i in range(len(IOUS)):
        right = np.flatnonzero(one.right[i])  # precision is greatest where an object was found
        hits = np.cumsum(weights[:, right], axis=1, dtype=np.float64)
        of_all = np.cumsum(weights * one.counts[i], axis=1, dtype=np.float64)[:, right]
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.nan_to_num(hits / of_all)
            recall = hits / objects[:, None]
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        passed = np.floor(100 * np.nan_to_num(recall) + CLOSE) + (hits > 0)  # of the thresholds of recall
        found[:, i] = (best * np.diff(passed, axis=1, prepend=0)).sum(1) / 101
    found[objects == 0] = np.nan
    return found


def matches_of(precision: AveragePrecision) -> list[Matched]:
    """The boxes of each class of which there are objects or predictions, matched as COCO matches them."""
    state = precision.metric_state
    truths = [np.asarray(labels) for labels in state["groundtruth_labels"]]
    said = [np.asarray(labels) for labels in state["detection_labels"]]
    overlaps = overlaps_of(precision)
    found = []
    for label in np.unique(np.concatenate([*truths, np.zeros(0, int)])):
        parts = []
        for i, (given, crowds) in enumerate(
            zip(state["detection_scores"], state["groundtruth_crowds"], strict=True)
        ):
            scores = given.float().numpy()  # numpy has no bfloat16
            own, there = np.flatnonzero(said[i] == label), np.flatnonzero(truths[i] == label)
            surest = own[np.argsort(-scores[own], kind="stable")][:MOST]
            crowd = np.asarray(crowds).astype(bool)[there]
            right, counted = match(overlaps[i][np.ix_(surest, there)], crowd)
            parts.append((np.full(len(surest), i), scores[surest], right, counted, (~crowd).sum()))
        images, scores, rights, counts, objects = zip(*parts, strict=True)
        order = np.argsort(-np.concatenate(scores), kind="stable")
        one = Matched(
            np.concatenate(images)[order],
            np.concatenate(rights, axis=1)[:, order],
            np.concatenate(counts, axis=1)[:, order],
            np.array(objects, dtype=np.float32),
        )
        if one.objects.any():
            found.append(one)
    return found


def overlaps_of(precision: AveragePrecision) -> list[Array]:
    """(predictions, objects) of each image: how much they overlap."""
    columns = ("detection_box", "groundtruth_box", "groundtruth_crowds")
    return [
        _overlaps(*boxes) for boxes in zip(*(precision.metric_state[name] for name in columns), strict=True)
    ]


def _overlaps(found: torch.Tensor, truth: torch.Tensor, crowds: torch.Tensor) -> Array:
    """(predictions, objects): intersection over union; of a crowd, over the prediction alone."""
    one, other = (
        box_convert(boxes.reshape(-1, 4).double(), "xywh", "xyxy").reshape(-1, 4) for boxes in (found, truth)
    )
    overlap = box_iou(one, other).numpy()
    if crowds.any():
        areas = [((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])).numpy() for b in (one, other)]
        common = overlap * (areas[0][:, None] + areas[1][None]) / (1 + overlap)
        overlap = np.where(crowds.bool().numpy(), common / np.maximum(areas[0], 1e-12)[:, None], overlap)
    return overlap


def match(overlap: Array, crowd: Array) -> tuple[Array, Array]:
    """Which predictions of an image are right, and which count, (IoUs, predictions): the surest first, each
    takes the free object that it overlaps most; one that lies on a crowd instead does not count.

    Args:
        overlap: (predictions, objects), the surest prediction first.
        crowd: (objects,), whether it is one.
    """
    right = np.zeros((len(IOUS), len(overlap)), bool)
    counted = np.ones_like(right)
    single = np.flatnonzero(~crowd)
    free = np.ones((len(IOUS), len(single)), bool)
    every = np.arange(len(IOUS))
    for i, row in enumerate(overlap):
        if len(single):
            open_to = np.where(free, row[single], -1)  # (IoUs, objects)
            best = len(single) - 1 - open_to[:, ::-1].argmax(1)  # of equal ones the last, as COCO has it
            right[:, i] = open_to[every, best] >= IOUS - 1e-10
            free[every[right[:, i]], best[right[:, i]]] = False
        if crowd.any():
            counted[:, i] = right[:, i] | (row[crowd].max() < IOUS - 1e-10)
    return right, counted
