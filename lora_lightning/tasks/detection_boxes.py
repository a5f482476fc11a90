"""Boxes over a picture as SVG of a page, each with its score, so that a slider can hide what is less sure."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFont
from torch import Tensor

from lora_lightning.report.labels import Rect, placed
from lora_lightning.report.page import address_of, text
from lora_lightning.report.pictures import WIDTH
from lora_lightning.tasks.detection_pictures import MISSED, RIGHT, TRUTH, WRONG, Example, Picture, judge
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.plurals import counted

with loading("torchvision"):
    from torchvision.transforms.functional import to_pil_image

LONGEST = 16  # characters of a class in a label
LETTERS, LINE = 11, 14  # size of a label's letters, and its height, in the units of a picture of WIDTH
MOST = 40  # boxes of a picture, the surest
TALLEST = 1.5  # a picture's height, in its width
KINDS = {"truth": TRUTH, "right": RIGHT, "wrong": WRONG, "missed": MISSED}


@dataclass(frozen=True)
class Shown:
    """A box as it is drawn.

    Attributes:
        box: left, top, right, bottom in the picture's pixels.
        kind: a key of `KINDS`.
        caption: of its label; empty without one.
        meaning: in words.
        score: it is shown at thresholds up to this, or, of an object that was missed, above it.
        mask: (height, width), bool.
    """

    box: Sequence[float]
    kind: str
    caption: str
    meaning: str
    score: float = math.inf
    mask: Tensor | None = None

    def on(self, threshold: float) -> bool:
        """Whether it is shown at a threshold."""
        return self.score < threshold if self.kind == "missed" else self.score >= threshold


def row(example: Example, names: Sequence[str], threshold: float, number: int, again: bool = False) -> str:
    """The truth, and what each state of the model finds, side by side or, on a telephone, one below another.

    Args:
        example: with all predictions that a slider may show.
        threshold: at which the page begins.
        number: of the picture, which the page holds once.
        again: the page holds it already.
    """
    picture = to_pil_image(example.image.clamp(0, 1).cpu())
    views = {"truth": truth_of(example.truth, names)}
    views |= {state: boxes_of(found, example.truth, names) for state, found in example.found.items()}
    figures: list[str] = []
    for title, boxes in views.items():
        first = not again and not figures
        label = f"test image {number + 1}, {title}: {_counted(boxes, threshold)}"
        drawn = overlay(picture, boxes, threshold, label, f"image{number}", first)
        figures.append(f"<figure>{drawn}<figcaption>{title}</figcaption></figure>")
    return f'<div class="views">{"".join(figures)}</div>'


def truth_of(truth: Picture, names: Sequence[str]) -> list[Shown]:
    """The objects."""
    masks = _masks(truth)
    return [
        Shown(box, "truth", _short(names[label - 1]), names[label - 1], mask=mask)
        for box, label, mask in zip(truth["boxes"].tolist(), truth["labels"].tolist(), masks, strict=True)
    ]


def boxes_of(prediction: Picture, truth: Picture, names: Sequence[str]) -> list[Shown]:
    """The surest predictions, right and wrong, the surest first, and the objects, each missed above some
    threshold."""
    verdict, masks = judge(prediction, truth), _masks(prediction)
    shown = []
    for i in prediction["scores"].argsort(descending=True, stable=True)[:MOST].tolist():
        name, score = names[int(prediction["labels"][i]) - 1], float(prediction["scores"][i])
        kind, mark = ("right", "") if verdict.right[i] else ("wrong", "✗ ")
        meaning = f"{name} {score:.2f}, {'right' if verdict.right[i] else 'a false positive'}"
        box = prediction["boxes"][i].tolist()
        shown.append(Shown(box, kind, f"{mark}{_short(name)} {score:.2f}", meaning, score, masks[i]))
    objects = zip(truth["boxes"].tolist(), truth["labels"].tolist(), verdict.scores, strict=True)
    missed = [
        Shown(box, "missed", "", f"{names[label - 1]}, missed", score)
        for box, label, score in objects
        if score < math.inf
    ]
    return [*shown, *missed]


def overlay(
    picture: Image.Image, boxes: Sequence[Shown], threshold: float, label: str, name: str, first: bool
) -> str:
    """A picture with boxes, masks and labels, of which none covers another.

    Args:
        label: what is seen, for those who cannot see it.
        name: of the picture in its page.
        first: the page does not hold the picture yet.
    """
    factor = WIDTH / max(picture.width, picture.height / TALLEST)
    width, height = picture.width * factor, picture.height * factor
    scaled = [[factor * v for v in one.box] for one in boxes]
    ground = f'<use href="#{name}"/>'
    if first:
        address, small = address_of(picture, 2 * WIDTH)
        style = ' class="small"' if small else ""
        ground = f'<image id="{name}"{style} width="{width:.1f}" height="{height:.1f}" href="{address}"/>'
    places = placed(scaled, [_size(one.caption) for one in boxes], width, height)
    shapes = [
        _group(one, _shape(one, box, factor), threshold) for one, box in zip(boxes, scaled, strict=True)
    ]
    labels = [
        _group(one, _label(one, place), threshold)
        for one, place in zip(boxes, places, strict=True)
        if place is not None and one.caption
    ]
    size = f'viewBox="0 0 {width:.1f} {height:.1f}"'
    drawn = "".join([ground, *reversed(shapes), *labels])  # the surest box above, and no box over a label
    return f'<svg class="boxes" {size} role="img" aria-label="{text(label, 200)}">{drawn}</svg>'


def _group(one: Shown, parts: str, threshold: float) -> str:
    """What a slider shows and hides together."""
    limits = {"truth": "", "missed": f' data-above="{max(-1, one.score):.6f}"'}
    limit = limits.get(one.kind, f' data-score="{one.score:.6f}"')
    state = f'{one.kind}"' if one.on(threshold) else f'{one.kind} off" aria-hidden="true"'
    return f'<g class="{state} style="color:{KINDS[one.kind]}"{limit}>{parts}</g>'


def _shape(one: Shown, box: Sequence[float], factor: float) -> str:
    x1, y1, x2, y2 = box
    mask = "" if one.mask is None else _shade(one.mask, KINDS[one.kind], factor)
    size = f'width="{max(0, x2 - x1):.1f}" height="{max(0, y2 - y1):.1f}"'
    return f'<title>{text(one.meaning, 100)}</title>{mask}<rect x="{x1:.1f}" y="{y1:.1f}" {size}/>'


def _label(one: Shown, place: Rect) -> str:
    left, top, right, _ = place
    wide = right - left
    ground = f'<path d="M{left:.1f} {top:.1f}h{wide:.1f}v{LINE}h-{wide:.1f}z"/>'
    at = f'x="{left + 2:.1f}" y="{top + LETTERS:.1f}" textLength="{wide - 4:.1f}"'
    return f"{ground}<text {at}>{text(one.caption)}</text>"


def _counted(boxes: Sequence[Shown], threshold: float) -> str:
    kinds = [one.kind for one in boxes if one.on(threshold)]
    if "truth" in kinds or not boxes:
        return counted(len(kinds), "object")
    return f"{kinds.count('right')} right, {kinds.count('wrong')} false, {kinds.count('missed')} missed"


def _size(caption: str) -> tuple[float, float]:
    """Of a label; nothing of an empty one, which is in nobody's way."""
    if not caption:
        return 0.0, 0.0
    return ImageFont.load_default(size=LETTERS).getlength(caption) + 4, float(LINE)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _masks(picture: Picture) -> list[Tensor | None]:
    """(height, width) of each object, bool; None of what has none."""
    if "masks" not in picture:
        return [None] * len(picture["labels"])
    masks = picture["masks"]
    return list((masks.float() > 0.5).reshape(len(masks), *masks.shape[-2:]).cpu())


def _shade(mask: Tensor, colour: str, factor: float) -> str:
    """A mask in one colour, half seen through, no larger than what it covers."""
    rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
    if not len(rows):
        return ""
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    inside = Image.fromarray(mask[top:bottom, left:right].numpy().astype(np.uint8) * 255)
    wide, high = factor * (right - left), factor * (bottom - top)
    inside = inside.resize((max(1, round(wide)), max(1, round(high))))
    shade = Image.new("P", inside.size)
    shade.putpalette([0, 0, 0, *(int(colour[i : i + 2], 16) for i in (1, 3, 5))])
    shade.putdata((np.asarray(inside) > 127).astype(np.uint8).ravel().tolist())
    file = io.BytesIO()
    shade.save(file, "PNG", transparency=0, bits=1)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<image class="mask" x="{factor * left:.1f}" y="{factor * top:.1f}" width="{wide:.1f}" '
        f'height="{high:.1f}" preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
    )
