"""The metrics that a run's CSV logger has written, as curves."""

from __future__ import annotations

import csv
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST = 300  # points of a curve on a page
WORDS = {  # of metrics whose names are no words
    "map": "mAP", "map_50": "AP at IoU .50", "map_75": "AP at IoU .75", "map_small": "AP of small objects",
    "map_medium": "AP of medium objects", "map_large": "AP of large objects", "miou": "mean IoU",
    "acc": "accuracy", "top5": "top-5 accuracy", "f1": "macro F1", "f1_micro": "micro F1", "mae": "MAE",
    "rmse": "RMSE", "r2": "R²", "ece": "calibration error", "wer": "WER", "cer": "CER",
    "aux": "loss of the auxiliary head", "loss_rpn_box_reg": "loss of the proposals' boxes",
    "loss_objectness": "loss of the proposals' scores", "loss_box_reg": "loss of the boxes",
    "bbox_regression": "loss of the boxes", "bbox_ctrness": "loss of the centres",
    "classification": "loss of the classes", "loss_classifier": "loss of the classes",
    "loss_mask": "loss of the masks",
}  # fmt: skip
NUMBERED = "metrics.*.csv"  # what resumed runs have put aside, the first begun as 1


@dataclass(frozen=True)
class Point:
    """A value, at a step of the optimizer and in an epoch."""

    step: int
    epoch: int
    value: float


Metrics = dict[str, list[Point]]  # by the metric's name, in the order of the steps


def read_metrics(folder: Path) -> Metrics:
    """What lies in `csv/` of a folder, the parts of a resumed run after one another; nothing without it.
    Lines that are damaged, as a killed process leaves one, are left out."""
    parts = sorted((folder / "csv").glob(NUMBERED), key=_number)
    last = folder / "csv" / "metrics.csv"
    found: Metrics = {}
    for path in [*parts, *([last] if last.is_file() else [])]:
        read = _read(path)
        began = min((p.step for points in read.values() for p in points), default=0)
        kept = {name: [p for p in points if p.step < began] for name, points in found.items()}
        found = {name: kept.get(name, []) + read.get(name, []) for name in dict.fromkeys([*found, *read])}
    return {name: points for name, points in found.items() if points}


def _number(path: Path) -> int:
    word = path.name.split(".")[1]
    return int(word) if word.isdigit() else 0


def _read(path: Path) -> Metrics:
    found: defaultdict[str, list[Point]] = defaultdict(list)
    for row in _rows(path):
        step, epoch = _whole(row.get("step")), _whole(row.get("epoch"))
        if step is None:
            continue
        for name, text in row.items():
            if (
                isinstance(name, str)
                and text
                and name not in ("step", "epoch")
                and (value := _float(text)) is not None
            ):
                found[name].append(Point(step, -1 if epoch is None else epoch, value))
    return {name: sorted(points, key=lambda p: p.step) for name, points in found.items()}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        try:
            yield from csv.DictReader(line.replace("\0", "") for line in file)
        except csv.Error:  # a field without an end
            return


def _float(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _whole(text: object) -> int | None:
    value = _float(text)
    return None if value is None else int(value)


def in_words(name: str) -> str:
    """A metric without its stage, as a page calls it: `AP at IoU .75`, `mask AP of small objects`,
    `WER, scottish`, `IoU of road`."""
    if name in WORDS:
        return WORDS[name]
    if name.startswith("mask_"):
        return f"mask {in_words(name.removeprefix('mask_'))}"
    first, slash, of = name.partition("/")
    if slash:
        return f"{'IoU' if first == 'iou' else in_words(first)} of {of}"
    first, _, rest = name.partition("_")
    if first in ("wer", "cer") and rest:
        return f"{WORDS[first]}, {rest}"
    return name.replace("_", " ")


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most so many points: each the mean of its neighbours, at the last step of theirs."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    groups = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [Point(g[-1].step, g[-1].epoch, sum(p.value for p in g) / len(g)) for g in groups]
