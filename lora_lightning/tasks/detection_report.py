"""The sections of a tested detector's page, and its contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from lora_lightning.report import page
from lora_lightning.report.charts import embedded
from lora_lightning.report.page import Section, leave, text
from lora_lightning.report.pictures import key, sheet
from lora_lightning.tasks.average_precision import AveragePrecision, class_precisions
from lora_lightning.tasks.detection_boxes import MOST, row
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

SHOWN, ON_SHEET = 12, 6  # test images on the page by each order, in the sheet
LEAST = 0.05  # the lowest threshold of the slider
STEPS = 100  # of thresholds from 0 to 1


def write_report(
    model: nn.Module,
    data: L.LightningDataModule,
    names: Sequence[str],
    threshold: float,
    folder: Path,
    area_scale: float = 1.0,
    masks: bool = False,
) -> list[str]:
    """contact_sheet.png, the sections of the page, and one line to print.

    Args:
        model: images -> predictions, with the trained weights; if it is adapted (the very module that
            was), it is also shown as it was before.
        names: of the classes.
        threshold: the least score of a prediction that counts.
        area_scale, masks: as of `AveragePrecision`.
    """
    found = Findings(threshold, len(names), area_scale, masks)
    for example in seen(model, data, EXAMINED):
        found.add(example)
    counts, last = found.counts, found.states[-1]
    sections = [_boxes(found, names), _precision(found, names)]
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
        f"The first {len(found.first)} test images": list(range(len(found.first))),
        f"Of {found.counts.images} test images, those with the most mistakes after training": worst,
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
    head = "".join(f'<th class="number">{name}</th>' for name in ("right", "false", "missed"))
    return (
        f'<div class="threshold"><label hidden>score of at least <input type="range" min="{found.least:g}" '
        f'max="1" step="{1 / STEPS:g}" value="{found.threshold:g}"> <output>{found.threshold:g}</output>'
        f'</label><table><tr><th class="name">{counts.images} images</th>{head}</tr>{"".join(rows)}</table>'
        f'<script type="application/json">{embedded(steps)}</script></div>'
        f"<script>{page.SLIDER.read_text(encoding='utf-8')}</script>"
    )


def _precision(found: Findings, names: Sequence[str]) -> Section:
    parts, computed = [], found.computed()
    for kind in ("bbox", "segm") if found.masks else ("",):
        part = f"{kind}_" if kind else ""
        tables = {state: class_precisions(one, len(names), part) for state, one in computed.items()}
        bars, curves = charts(tables, names, found.objects)
        title = {"bbox": "<h3>Boxes</h3>", "segm": "<h3>Masks</h3>"}.get(kind, "")
        parts.append(f"{title}{bars}<h3>Precision by recall, IoU of at least 0.5</h3>{curves}")
    before = (
        " The bar is after training, the mark before, with the adapter off." if len(found.states) > 1 else ""
    )
    lead = f"<p>Of the first {found.counts.images} test images, as COCO counts.{before}</p>"
    return Section("Precision by class", lead + "".join(parts))
