"""Rows of pictures as a contact sheet, and the key to their colours, for detection and segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from lora_lightning.report.page import text

WIDTH = 288  # of a picture in the sheet and on the page
Views = Mapping[str, Image.Image]  # the pictures of one example by their titles
Legend = Sequence[tuple[str, str]]  # a colour as CSS has it, and what it means


def sheet(columns: Sequence[Views], legend: Legend, gap: int = 6) -> Image.Image:
    """A column for each example, a row for each title; the legend beneath."""
    rows = [[column[title] for column in columns] for title in columns[0]]
    height = max(picture.height for row in rows for picture in row)
    left, font = 76, ImageFont.load_default(size=15)
    width = left + len(columns) * (WIDTH + gap)
    places, lines = _legend_places(legend, left, width, font)
    picture = Image.new("RGB", (width, len(rows) * (height + gap) + 24 * lines + 2), "white")
    draw = ImageDraw.Draw(picture)
    for r, (title, row) in enumerate(zip(columns[0], rows, strict=True)):
        draw.text((6, r * (height + gap) + 6), title, "black", font)
        for c, view in enumerate(row):
            picture.paste(view, (left + c * (WIDTH + gap), r * (height + gap)))
    top = picture.height - 24 * lines
    for (x, line), (colour, meaning) in zip(places, legend, strict=True):
        y = top + 24 * line
        draw.rectangle((x, y + 5, x + 12, y + 17), fill=colour)
        draw.text((x + 18, y + 1), meaning, "black", font)
    return picture


def _legend_places(
    legend: Legend, left: int, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> tuple[list[tuple[int, int]], int]:
    """Where each entry begins, in pixels from the left and in lines, and how many lines there are."""
    places: list[tuple[int, int]] = []
    x, line = left, 0
    for _, meaning in legend:
        length = 40 + int(font.getlength(meaning))
        if x + length > width and x > left:
            x, line = left, line + 1
        places.append((x, line))
        x += length
    return places, line + 1


def key(legend: Legend) -> str:
    """The legend as HTML."""
    swatches = "".join(
        f'<span><i style="background:{colour}"></i>{text(meaning)}</span>' for colour, meaning in legend
    )
    return f'<p class="key">{swatches}</p>'
