"""Rows of pictures as a contact sheet and as an HTML page: what the reports on pictures have in common."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image, ImageDraw, ImageFont

WIDTH = 288  # of a picture in the sheet and on the page
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem}
img{display:block;width:100%}td,th{padding:3px;text-align:left;font-weight:500}table{width:100%}
i{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}
.numbers{width:auto}.numbers td{padding:0 1.2em 0 3px;font-variant-numeric:tabular-nums}"""
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


def page(
    title: str, lines: Sequence[str], legend: Legend, sections: Mapping[str, Sequence[Views]], more: str = ""
) -> str:
    """An HTML page that holds its pictures: a table for each section, with a row for each example.

    Args:
        lines: paragraphs before the pictures.
        sections: headline -> examples.
        more: HTML before the sections.
    """
    swatches = "".join(f'<i style="background:{c}"></i>{escape(m)}' for c, m in legend)
    parts = [f"<p>{escape(line)}</p>" for line in lines] + [more, f"<p>{swatches}</p>"]
    for headline, rows in sections.items():
        head = "".join(f"<th>{escape(state)}</th>" for state in rows[0])
        body = "".join(
            "<tr>" + "".join(f'<td><img alt="" src="{_inline(p)}"></td>' for p in row.values()) + "</tr>"
            for row in rows
        )
        parts.append(f"<h2>{escape(headline)}</h2><table><tr>{head}</tr>{body}</table>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def number_table(headline: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts and numbers as HTML, for `page`."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<h2>{escape(headline)}</h2><table class="numbers"><tr>{titles}</tr>{body}</table>'


def _inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
