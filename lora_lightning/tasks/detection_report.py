"""The sections of a tested detector's page, and its contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.report import page, specs
from lora_lightning.report.charts import chart, embedded
from lora_lightning.report.page import Section, leave, text
from lora_lightning.report.pictures import key, sheet
from lora_lightning.tasks.detection_boxes import MOST, row
from lora_lightning.tasks.detection_confusion import BACKGROUND, Detections
from lora_lightning.tasks.detection_curves import Counts, charts
from lora_lightning.tasks.detection_pictures import LEGEND, Example, Picture, confident, judge, views_of
from lora_lightning.tasks.examples import Kept
from lora_lightning.tasks.reporting import EXAMPLES, in_words
from lora_lightning.utils.plurals import counted

EXAMINED = 200  # test images that are judged for the slider, of which the worst are shown
ON_SHEET = 4  # test images in the sheet
MATRIX = 50  # classes up to which a confusion matrix is drawn
LEAST = 0.05  # the lowest threshold of the slider
STEPS = 100  # of thresholds from 0 to 1
Tested = Mapping[str, Detections]  # of each state of the model, the last one what is now


def write_report(found: Findings, tested: Tested, names: Sequence[str], folder: Path) -> list[str]:
    """contact_sheet.png, the sections of the page, and one line to print.

    Args:
        found: what was kept of the test's images, of which there is one at least.
        tested: of the whole test.
        names: of the classes.
    """
    threshold = found.threshold
    sections = [_boxes(found, names), *_confusions(tested, names, threshold), _precision(tested, names)]
    leave(folder, sections, "Detections")
    columns = [views_of(example.confident(threshold), names) for example in found.kept.first[:ON_SHEET]]
    sheet(columns, LEGEND).save(folder / "contact_sheet.png")
    told = found.counts.in_words(found.states[-1], threshold)
    return [f"{told} (scores of at least {threshold:g}, IoU of at least 0.5)", ""]


class Findings:
    """What is kept of a test's images while it goes on: the first and the worst of them, and how many of the
    predictions are right at each threshold. Only the first 200 images are judged.

    Args:
        threshold: the least score of a prediction that counts.
        first: images that are kept from the beginning on.
    """

    def __init__(self, threshold: float, first: int = EXAMPLES) -> None:
        self.threshold, self.least = threshold, min(LEAST, threshold)
        self.states: list[str] = []
        self.kept: Kept[Example] = Kept(first, EXAMPLES)

    def add(self, images: Sequence[Tensor], truths: Sequence[Picture], found: Mapping[str, Any]) -> None:
        """The next batch.

        Args:
            found: the predictions for each image, by the state of the model.
        """
        if not self.states:
            self.states = list(found)
            self.counts = Counts(self.states)
        for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
            if self.kept.count < EXAMINED:
                sure: dict[str, Picture] = {
                    state: confident(_plain(each[i]), self.least) for state, each in found.items()
                }
                self._add(Example(image, _plain(truth), sure))

    def _add(self, example: Example) -> None:
        self.counts.add(example)
        now = confident(example.found[self.states[-1]], self.threshold)
        self.kept.add(judge(now, example.truth).mistakes, lambda: _shown(example))


def _plain(picture: Picture) -> dict[str, Any]:
    """On the CPU, in full precision, masks as bits, which take a quarter of the room."""
    found = {}
    for name, value in picture.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
            value = value > 0.5 if name == "masks" else value
        found[name] = value
    return found


def _shown(example: Example) -> Example:
    """What a page has room for."""
    found: dict[str, Picture] = {}
    for state, one in example.found.items():
        surest = one["scores"].argsort(descending=True, stable=True)[:MOST]
        found[state] = {name: tensor[surest] for name, tensor in one.items()}
    return Example(example.image.detach().float().cpu(), example.truth, found)


def _boxes(found: Findings, names: Sequence[str]) -> Section:
    """The first and the worst pictures, under a slider for the score that a box must have."""
    first = found.kept.first[:EXAMPLES]
    examples: dict[int, Example] = dict(enumerate(first))
    worst = [place for mistakes, place, _ in found.kept.worst if mistakes]
    examples |= {place: example for _, place, example in found.kept.worst}
    groups = {
        f"The first {counted(len(first), 'test image')}": list(range(len(first))),
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


def _confusions(tested: Tested, names: Sequence[str], threshold: float) -> list[Section]:
    """What objects are taken for, of few classes."""
    if len(names) > MATRIX:
        return []
    every = specs.apart([*names, BACKGROUND])
    side = (26 if len(every) <= specs.WRITTEN else 14) * len(every) + 90
    figures = []
    for state, one in tested.items():
        spec = specs.confusion(one.taken_for, every, "boxes")
        drawn = chart(spec, f"confusion matrix of boxes, {state}", min(side, 8 * len(every) + 90), side)
        figures.append(f"<div><h3>{state}</h3>{drawn}</div>")
    note = (
        f"Of all test images, predictions with a score of at least {threshold:g}, by the object that they "
        "overlap by an IoU of at least 0.5, whatever its class. Rows are true classes, columns predicted "
        f"ones: the row “{BACKGROUND}” is what was found where nothing is, the column what was missed."
    )
    html = f'<p class="soft">{note}</p><div class="two">{"".join(figures)}</div>'
    return [Section("What is taken for what", html)]


def _precision(tested: Tested, names: Sequence[str]) -> Section:
    parts, now = [], list(tested.values())[-1]
    for kind in now.precisions:
        tables = {state: one.precisions[kind] for state, one in tested.items()}
        bars, curves = charts(tables, names, now.objects)
        title = f"<h3>{kind.capitalize()}</h3>" * (len(now.precisions) > 1)
        parts.append(f"{title}{bars}<h3>Precision by recall, IoU of at least 0.5</h3>{curves}")
    before = " The bar is after training, the mark before." * (len(tested) > 1)
    lead = f"<p>Of {counted(now.images, 'test image')}, as COCO counts.{before}</p>"
    return Section("Precision by class", lead + "".join(parts))
