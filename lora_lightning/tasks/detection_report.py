"""The sections of a tested detector's page, and its contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from lora_lightning.report import page, specs
from lora_lightning.report.charts import chart, embedded
from lora_lightning.report.page import Section, leave, text
from lora_lightning.report.pictures import key, sheet
from lora_lightning.tasks.average_precision import AveragePrecision, class_precisions
from lora_lightning.tasks.bootstrap import Array
from lora_lightning.tasks.detection_boxes import MOST, row
from lora_lightning.tasks.detection_confusion import BACKGROUND
from lora_lightning.tasks.detection_curves import Counts, charts
from lora_lightning.tasks.detection_pictures import (
    EXAMINED,
    LEGEND,
    Example,
    Picture,
    confident,
    judge,
    seen,
    views_of,
)
from lora_lightning.tasks.reporting import AFTER, in_words
from lora_lightning.utils.plurals import counted

SHOWN, ON_SHEET = 12, 4  # test images on the page by each order, in the sheet
MATRIX = 50  # classes up to which a confusion matrix is drawn
LEAST = 0.05  # the lowest threshold of the slider
STEPS = 100  # of thresholds from 0 to 1


def write_report(
    model: nn.Module,
    data: L.LightningDataModule,
    names: Sequence[str],
    found: Findings,
    matrices: Mapping[str, Array],
    folder: Path,
    now: str = AFTER,
) -> list[str]:
    """contact_sheet.png, the sections of the page, and one line to print.

    Args:
        model: images -> predictions, with the trained weights; if it is adapted (the very module that
            was), it is also shown as it was before.
        names: of the classes.
        found: of no image yet.
        matrices: as `taken_for` has it, of the whole test, by the state of the model.
        now: the word for the model as it is.
    """
    threshold = found.threshold
    for example in seen(model, data, EXAMINED, now):
        found.add(example)
    counts, last = found.counts, found.states[-1]
    sections = [_boxes(found, names), *_confusions(matrices, names, threshold), _precision(found, names)]
    leave(folder, sections, "Detections")
    columns = [views_of(example.confident(threshold), names) for example in found.first[:ON_SHEET]]
    sheet(columns, LEGEND).save(folder / "contact_sheet.png")
    return [
        f"{counts.in_words(last, threshold)} (scores of at least {threshold:g}, IoU of at least 0.5)",
        "",
    ]


class Findings:
    """What is kept of the test images: the first and the worst of them, and numbers of all.

    Args:
        threshold: the least score of a prediction that counts.
        classes: how many there are.
        area_scale, masks: as of `AveragePrecision`.
    """

    def __init__(self, threshold: float, classes: int, area_scale: float, masks: bool) -> None:
        self.threshold, self.least, self.masks = threshold, min(LEAST, threshold), masks
        self.states: list[str] = []
        self.first: list[Example] = []
        self.worst: list[tuple[int, int, Example]] = []  # mistakes, place, image
        self.objects = np.zeros(classes, int)
        self._precisions: dict[str, AveragePrecision] = {}
        self._options = {"masks": masks, "area_scale": area_scale, "curves": True}

    def add(self, example: Example) -> None:
        """The next image."""
        if not self.states:
            self.states = list(example.found)
            self.counts = Counts(self.states)
            options: Any = self._options
            self._precisions = {state: AveragePrecision(**options) for state in self.states}
        for state, found in example.found.items():
            self._precisions[state].update([found], [example.truth])
        self.counts.add(example)
        labels = example.truth["labels"].cpu()
        self.objects += np.bincount(labels - 1, minlength=len(self.objects))
        kept = Example(example.image, example.truth, {s: self._shown(f) for s, f in example.found.items()})
        place = self.counts.images - 1
        if len(self.first) < SHOWN:
            self.first.append(kept)
        now = confident(example.found[self.states[-1]], self.threshold)
        self.worst.append((judge(now, example.truth).mistakes, place, kept))
        self.worst = sorted(self.worst, key=lambda one: (-one[0], one[1]))[:SHOWN]

    def _shown(self, prediction: Picture) -> dict[str, torch.Tensor]:
        """What a slider may show."""
        found = confident(prediction, self.least)
        surest = found["scores"].argsort(descending=True, stable=True)[:MOST]
        return {name: tensor[surest] for name, tensor in found.items()}

    def computed(self) -> dict[str, dict[str, torch.Tensor]]:
        """COCO's scores and tables, of each state; the first process alone makes a report."""
        return {state: one.here() for state, one in self._precisions.items()}


def _boxes(found: Findings, names: Sequence[str]) -> Section:
    """The first and the worst pictures, under a slider for the score that a box must have."""
    examples: dict[int, Example] = dict(enumerate(found.first))
    worst = [place for mistakes, place, _ in found.worst if mistakes]
    examples |= {place: example for _, place, example in found.worst}
    groups = {
        f"The first {counted(len(found.first), 'test image')}": list(range(len(found.first))),
        f"Of {counted(found.counts.images, 'test image')}, those with the most mistakes "
        f"{in_words(found.states[-1])}": worst,
    }
    parts = [
        f"<p>Shown are predictions with a score of at least {found.threshold:g} "
        "(<code>task.score_threshold</code>). One is right whose class is right and whose box overlaps the "
        f"object's by an IoU of at least 0.5. At most {MOST} boxes a picture; a label that finds no room is "
        "left out, and comes when one points at its box.</p>",
        _slider(found),
        key(LEGEND),
    ]
    shown: set[int] = set()
    for title, places in groups.items():
        if places:
            parts.append(f"<h3>{text(title, 200)}</h3>")
        for place in places:
            parts.append(row(examples[place], names, found.threshold, place, place in shown))
            shown.add(place)
    return Section("Boxes in test images", "\n".join(parts))


def _slider(found: Findings) -> str:
    """The threshold, and how many are right at it; without a script it stays where it is."""
    counts = found.counts
    steps = {
        state: [counts.at(state, max(i / STEPS, found.least)) for i in range(STEPS + 1)]
        for state in found.states
    }
    rows = []
    for state in found.states:
        cells = "".join(f'<td class="number">{n}</td>' for n in counts.at(state, found.threshold))
        rows.append(f'<tr data-state="{state}"><td class="name">{state}</td>{cells}</tr>')
    head = f'<th class="name">{counted(counts.images, "image")}</th>'
    head += "".join(f'<th class="number">{name}</th>' for name in ("right", "false", "missed"))
    return (
        f'<div class="threshold"><label hidden>score of at least <input type="range" min="{found.least:g}" '
        f'max="1" step="{1 / STEPS:g}" value="{found.threshold:g}"> <output>{found.threshold:g}</output>'
        f"</label><table><tr>{head}</tr>{''.join(rows)}</table>"
        f'<script type="application/json">{embedded(steps)}</script></div>'
        f"<script>{page.SLIDER.read_text(encoding='utf-8')}</script>"
    )


def _confusions(matrices: Mapping[str, Array], names: Sequence[str], threshold: float) -> list[Section]:
    """What objects are taken for, of few classes; nothing before a test."""
    if not matrices or len(names) > MATRIX:
        return []
    every = specs.apart([*names, BACKGROUND])
    side = (26 if len(every) <= specs.WRITTEN else 14) * len(every) + 90
    figures = []
    for state, counts in matrices.items():
        spec = specs.confusion(counts, every, "boxes")
        drawn = chart(spec, f"confusion matrix of boxes, {state}", min(side, 8 * len(every) + 90), side)
        figures.append(f"<div><h3>{state}</h3>{drawn}</div>")
    note = (
        f"Of all test images, predictions with a score of at least {threshold:g}, by the object that they "
        "overlap by an IoU of at least 0.5, whatever its class. Rows are true classes, columns predicted "
        f"ones: the row “{BACKGROUND}” is what was found where nothing is, the column what was missed."
    )
    html = f'<p class="soft">{note}</p><div class="two">{"".join(figures)}</div>'
    return [Section("What is taken for what", html)]


def _precision(found: Findings, names: Sequence[str]) -> Section:
    parts, computed = [], found.computed()
    for kind in ("bbox", "segm") if found.masks else ("",):
        part = f"{kind}_" if kind else ""
        tables = {state: class_precisions(one, len(names), part) for state, one in computed.items()}
        bars, curves = charts(tables, names, found.objects)
        title = {"bbox": "<h3>Boxes</h3>", "segm": "<h3>Masks</h3>"}.get(kind, "")
        parts.append(f"{title}{bars}<h3>Precision by recall, IoU of at least 0.5</h3>{curves}")
    before = " The bar is after training, the mark before, with the adapter off." * (len(found.states) > 1)
    lead = f"<p>Of the first {counted(found.counts.images, 'test image')}, as COCO counts.{before}</p>"
    return Section("Precision by class", lead + "".join(parts))
