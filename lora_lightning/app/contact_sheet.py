"""Pictures with what was predicted, in one picture: tiles whose captions never run into another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lora_lightning.data.decoding import read_picture
from lora_lightning.data.findings import DataError
from lora_lightning.utils.atomic import write_whole

SHOWN = 60  # pictures in a sheet
WIDE = 6  # in a row
TILE, TALL, GAP = 200, 150, 16  # pixels of a picture's place, and between two
LINES, LABEL_SIZE, NAME_SIZE = 3, 15, 12  # of a caption at most; pixels of letters
PAPER, INK, FAINT, EMPTY = "#ffffff", "#1b1f24", "#6a737d", "#eceff2"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Shown = tuple[Path, str, str]  # a file, what is predicted, how sure


def write_sheet(path: Path, shown: Sequence[Shown], names: Sequence[str]) -> None:
    """Draw the pictures in rows of six, whole and in their proportions, each over its caption and its name.

    Args:
        path: of the file to write, whose suffix says its form.
        shown: one that cannot be read is an empty tile.
        names: of the pictures.
    """
    label, small = _font(LABEL_SIZE), _font(NAME_SIZE)
    captions = [_wrapped(text, sure, label) for _, text, sure in shown]
    line = LABEL_SIZE + 5
    below = line * max(len(lines) for lines in captions) + NAME_SIZE + 8
    across = min(WIDE, len(shown))
    down = math.ceil(len(shown) / across)
    size = (GAP + across * (TILE + GAP), GAP + down * (TALL + below + GAP))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (file, _, sure) in enumerate(shown):
        x = GAP + number % across * (TILE + GAP)
        y = GAP + number // across * (TALL + below + GAP)
        sheet.paste(_tile(file, small), (x, y))
        for row, text in enumerate(captions[number]):
            draw.text((x, y + TALL + 4 + row * line), text, INK, label)
        if sure:
            right = x + TILE - draw.textlength(sure, label)
            draw.text((right, y + TALL + 4), sure, FAINT, label)
        bottom = y + TALL + 4 + len(captions[number]) * line
        draw.text((x, bottom), _cut(names[number], small, TILE, middle=True), FAINT, small)
    form = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    write_whole(path, lambda temporary: sheet.save(temporary, form))


def _tile(file: Path, font: Font) -> Image.Image:
    """A picture in the middle of its place; why there is none."""
    tile = Image.new("RGB", (TILE, TALL), EMPTY)
    try:
        picture = read_picture(file)
    except DataError:
        draw = ImageDraw.Draw(tile)
        draw.text((TILE / 2, TALL / 2), "cannot be read", FAINT, font, anchor="mm")
        return tile
    factor = min(TILE / picture.width, TALL / picture.height)
    fitted = max(1, round(factor * picture.width)), max(1, round(factor * picture.height))
    picture = picture.resize(fitted, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST)
    tile.paste(picture, ((TILE - picture.width) // 2, (TALL - picture.height) // 2))
    return tile


def _wrapped(text: str, sure: str, font: Font) -> list[str]:
    """A caption in lines that fit below their picture, the first beside how sure it is."""
    room = TILE - (font.getlength(sure) + 8 if sure else 0)
    if sure:
        return [_cut(text, font, room)]
    lines: list[str] = []
    for word in text.split(" "):
        if lines and font.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    kept = [_cut(line, font, room) for line in lines[:LINES]]
    if len(lines) > LINES:
        kept[-1] = _cut(f"{lines[LINES - 1]} …", font, room)
    return kept


def _cut(text: str, font: Font, room: float, middle: bool = False) -> str:
    """A text that fits into so many pixels, with "…" for what is left out: its end, or its middle."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    for kept in range(len(text) - 1, 0, -1):
        back = kept // 2 if middle else 0
        short = f"{text[: kept - back]}…{text[len(text) - back :] if back else ''}"
        if font.getlength(short) <= room:
            return short
    return "…"


def _font(size: int) -> Font:
    """DejaVu Sans, which matplotlib brings and has letters of many languages; else PIL's own."""
    spec = find_spec("matplotlib")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size=size)
