"""The sections of a tested segmentation model's page, and its contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_lightning.data.mask_files import IGNORED
from lora_lightning.data.mask_pictures import BLACK, Colour
from lora_lightning.report import specs
from lora_lightning.report.charts import chart
from lora_lightning.report.page import Section, image, leave, table, text
from lora_lightning.report.pictures import WIDTH, key, sheet
from lora_lightning.tasks.confusion import Segmentation, ious
from lora_lightning.tasks.examples import Kept
from lora_lightning.tasks.reporting import EXAMPLES, bars_in_words, in_words
from lora_lightning.tasks.segmentation_pictures import WRONG, Example, tables_of, views_of
from lora_lightning.utils.plurals import counted

ON_SHEET = 6  # test pictures in the sheet
MATRIX, BARS = 50, 30  # classes up to which a matrix is drawn, and with bars: those with the lowest IoU
NAMED = 4  # classes of a mask, for those who cannot see it
Judged = Mapping[str, Segmentation]  # of each state of the model, the last one what is now


def write_report(
    kept: Kept[Example],
    tested: Judged,
    data: Any,
    names: Sequence[str],
    colours: Sequence[Colour],
    folder: Path,
) -> list[str]:
    """contact_sheet.png, the sections of the page, and a line to print.

    Args:
        kept: pictures of the test, of which there is one at least.
        tested: of the whole test part.
        data: shows its pictures by `show`.
        names, colours: of the classes.
    """
    now = list(tested)[-1]
    legend = [(_css(colour), name) for name, colour in zip(names, colours, strict=True) if colour != BLACK]
    legend.append((_css(WRONG), "mistakes: another class than the truth"))
    apart = specs.apart(names)
    sections = [
        _scores(tested),
        _classes(tested, apart),
        _confusions(tested, apart),
        _pictures(kept, tested, data, names, colours, key(legend)),
    ]
    leave(folder, sections, "Segmented pictures")
    columns = [views_of(e, data.show("test", e.place)[1], colours) for e in kept.first[:ON_SHEET]]
    sheet(columns, legend).save(folder / "contact_sheet.png")
    return [*_lowest(tested[now], names), ""]


def _lowest(tested: Segmentation, names: Sequence[str]) -> list[str]:
    """The classes with the lowest intersection over union."""
    each = [
        (value, name)
        for name, value in zip(names, ious(tested.matrix()).tolist(), strict=True)
        if value == value
    ]
    shown = [f"{name} {100 * value:.1f}" for value, name in sorted(each)[:5]]
    return [f"lowest IoU %: {', '.join(shown)}"] if len(each) > 1 else []


def _scores(tested: Judged) -> Section:
    """Mean IoU and pixels, before and after."""
    rows = []
    for name, title in (("miou", "mIoU %"), ("acc", "pixels right %")):
        rows.append([title, *(_interval(one, name) for one in tested.values())])
    count = len(list(tested.values())[-1].pictures)
    lead = f"{counted(count, 'test picture')}. In brackets, 95 % intervals by the bootstrap over pictures."
    return Section("Scores on the test pictures", f"<p>{lead}</p>" + table(["", *tested], rows))


def _interval(one: Segmentation, name: str) -> str:
    low, high = one.intervals()[name]
    return f"{100 * one.scores()[name]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _classes(tested: Judged, names: Sequence[str]) -> Section:
    """Bars of IoU in the order of the classes; of many, those with the lowest; and all in numbers."""
    now, states = list(tested.values())[-1], list(tested)
    values, bounds = ious(now.matrix()), now.class_intervals()
    before = ious(tested[states[0]].matrix()) if len(states) > 1 else np.full(len(names), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = np.sort(known[np.argsort(values[known], kind="stable")][:BARS])
    rows = [
        {"class": names[i]}
        | {
            column: None if np.isnan(value) else 100 * float(value)
            for column, value in zip(
                ("IoU %", "low", "high", "before"), (values[i], *bounds[i], before[i]), strict=True
            )
        }
        for i in order
    ]
    note = bars_in_words(states)
    if len(known) > BARS:
        note += f" The {BARS} classes with the lowest IoU."
    figure = chart(specs.bars(rows, "class", "IoU %"), "intersection over union of each class", widest=640)
    header, cells = tables_of(now, names)["per_class"]
    every = table(*_in_percent(header, cells, 1))
    title = f"All classes in numbers, of {counted(len(now.pictures), 'test picture')}"
    folded = f"<details><summary>{title}</summary>{every}</details>"
    return Section("Classes", f'<p class="soft">{note}</p>{figure}{folded}')


def _confusions(tested: Judged, names: Sequence[str]) -> Section:
    parts = []
    if len(names) <= MATRIX:
        side = (26 if len(names) <= specs.WRITTEN else 14) * len(names) + 90
        figures = [
            f"<div><h3>{state}</h3>"
            + chart(
                specs.confusion(one.matrix(), names, "pixels"),
                f"confusion matrix of pixels, {state}",
                min(side, 8 * len(names) + 90),
                side,
            )
            + "</div>"
            for state, one in tested.items()
        ]
        parts.append('<p class="soft">Rows are true classes, columns found ones; % of the true pixels.</p>')
        parts.append(f'<div class="two">{"".join(figures)}</div>')
    if "confused" in (tables := tables_of(list(tested.values())[-1], names)):
        parts.append(f"<h3>Confused most</h3>{table(*_in_percent(*tables['confused'], 2))}")
    return Section("What is taken for what", "".join(parts))


def _pictures(
    kept: Kept[Example],
    tested: Judged,
    data: Any,
    names: Sequence[str],
    colours: Sequence[Colour],
    legend: str,
) -> Section:
    first, now = kept.first[:EXAMPLES], list(tested)[-1]
    lowest = f"Of {counted(kept.count, 'test picture')}, those with the lowest mIoU {in_words(now)}"
    groups = {
        f"The first {counted(len(first), 'test picture')}": first,
        lowest: [example for _, _, example in kept.worst],
    }
    parts = [legend]
    for title, shown in groups.items():
        parts.append(f"<h3>{text(title, 200)}</h3>")
        for example in shown:
            name, picture = data.show("test", example.place)
            scores = ", ".join(
                f"{state} {100 * one.picture_miou(example.place):.1f}" for state, one in tested.items()
            )
            parts.append(f'<p class="soft">{text(name)}: mIoU % {scores}</p>')
            parts.append(_row(example, str(name), picture, names, colours))
    return Section("Masks in test pictures", "\n".join(parts))


def _row(
    example: Example, name: str, picture: Image.Image, names: Sequence[str], colours: Sequence[Colour]
) -> str:
    """The pictures of one example, side by side, on a telephone two by two."""
    masks = {"truth": example.truth, **example.found}
    figures = []
    for title, view in views_of(example, picture, colours).items():
        said = f": {_most(masks[title], names)}" if title in masks else ""
        shown = image(view, f"{name[:40]}, {title}{said}", 2 * WIDTH)
        figures.append(f"<figure>{shown}<figcaption>{title}</figcaption></figure>")
    return f'<div class="views many">{"".join(figures)}</div>'


def _most(mask: np.ndarray, names: Sequence[str]) -> str:
    """`road 52 %, sky 30 %`: the classes that cover most."""
    counts = np.bincount(mask[mask != IGNORED].ravel(), minlength=len(names))
    most = [i for i in np.argsort(-counts, kind="stable")[:NAMED] if counts[i]]
    return ", ".join(f"{names[i]} {100 * counts[i] / mask.size:.0f} %" for i in most) or "no class"


def _in_percent(
    header: Sequence[str], rows: Sequence[Sequence[Any]], words: int
) -> tuple[list[str], list[list[Any]], int]:
    """What `table` takes: fractions in percent behind so many columns of words."""
    head = [*header[:words], *(f"{title} %" for title in header[words:])]
    cells = [[*row[:words], *("–" if v is None else f"{100 * v:.2f}" for v in row[words:])] for row in rows]
    return head, cells, words


def _css(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
