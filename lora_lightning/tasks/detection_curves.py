"""How many boxes are right, by the score that they must have: counts at thresholds, precision by recall."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lora_lightning.report import specs
from lora_lightning.report.charts import chart
from lora_lightning.tasks.detection_pictures import Example, judge
from lora_lightning.tasks.reporting import BEFORE, in_words
from lora_lightning.utils.plurals import counted

CLASSES, BARS = 12, 30  # of which there are curves, and bars
Precisions = dict[str, np.ndarray]  # of each state: by IoU, recall and class


class Counts:
    """Right and wrong predictions and objects by score, over test images.

    Args:
        states: of the model.
    """

    def __init__(self, states: Sequence[str]) -> None:
        self.right: dict[str, list[float]] = {state: [] for state in states}
        self.wrong: dict[str, list[float]] = {state: [] for state in states}
        self.objects: dict[str, list[float]] = {state: [] for state in states}
        self.images = 0

    def add(self, example: Example) -> None:
        """An image with all of its predictions."""
        self.images += 1
        for state, found in example.found.items():
            verdict = judge(found, example.truth)
            for score, right in zip(found["scores"].tolist(), verdict.right, strict=True):
                (self.right if right else self.wrong)[state].append(score)
            self.objects[state] += [score for score in verdict.scores if score < math.inf]

    def at(self, state: str, threshold: float) -> tuple[int, int, int]:
        """How many predictions are right, how many false, and how many objects are missed."""
        lists = self.right[state], self.wrong[state]
        right, wrong = (sum(score >= threshold for score in scores) for scores in lists)
        return right, wrong, sum(score < threshold for score in self.objects[state])

    def in_words(self, state: str, threshold: float) -> str:
        """`after training: 5 right, 1 false positives, 0 missed in 5 images`"""
        right, wrong, missed = self.at(state, threshold)
        found = f"{right} right, {counted(wrong, 'false positive')}, {missed} missed"
        return f"{in_words(state)}: {found} in {counted(self.images, 'image')}"


def charts(precisions: Precisions, names: Sequence[str], objects: np.ndarray) -> tuple[str, str]:
    """Bars of each class's average precision, and curves of precision by recall at an IoU of 0.5, as HTML.

    Args:
        precisions: of the states, the last one what is now.
        objects: (classes,), how many there are: of many classes those are shown that have the most.
    """
    last = list(precisions)[-1]
    known = [i for i in np.argsort(-objects, kind="stable") if objects[i]]
    shown = np.sort(known[:BARS])
    values = {state: 100 * table[:, :, shown].mean((0, 1)) for state, table in precisions.items()}
    title = "AP %"
    rows = [
        {
            "class": names[i],
            title: values[last][n],
            "before": values[BEFORE][n] if len(values) > 1 else None,
        }
        for n, i in enumerate(shown)
    ]
    spec = specs.bars(rows, "class", title, title="AP %, the mean over IoU 0.5 to 0.95")
    bars = chart(spec, "average precision of each class", widest=640)
    figures = [_curve(precisions, names[i], i) for i in np.sort(known[:CLASSES])]
    return bars, f'<div class="curves">{"".join(figures)}</div>'


def _curve(precisions: Precisions, name: str, i: int) -> str:
    tables = {state: table[0, :, i] for state, table in precisions.items()}
    rows = [
        {"state": state, "recall %": recall, "precision %": precision}
        for state, curve in tables.items()
        for recall, precision in corners(curve)
    ]
    states = {state: specs.STATES[state] for state in tables}
    words = ", ".join(f"{state} {100 * curve.mean():.1f}" for state, curve in tables.items())
    spec = specs.curves(rows, "recall %", "precision %", states)
    spec["title"] = {"text": name, "subtitle": f"AP50 {words}"}
    return chart(spec, f"precision by recall of {name}: AP50 {words}")


def corners(curve: np.ndarray) -> list[tuple[float, float]]:
    """Recall and precision in percent where a curve of steps changes.

    Args:
        curve: (101,), precision at recalls from 0 to 1; it holds up to its recall from the one before.
    """
    last = [i for i in range(len(curve)) if i + 1 == len(curve) or curve[i + 1] != curve[i]]
    return [(float(i), 100 * float(curve[i])) for i in dict.fromkeys([0, *last])]
