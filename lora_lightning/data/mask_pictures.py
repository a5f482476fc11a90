"""Masks as pictures: colours of classes, a mask laid over its picture, a PNG with a palette."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lora_lightning.data.mask_files import IGNORED

Colour = tuple[int, int, int]
GROUND = ("background", "bg", "0", "other", "others", "unlabeled", "unlabelled", "none", "void")
BLACK = (0, 0, 0)  # is not laid over a picture
TURN = 0.61803398875  # of the colour circle, the golden ratio: colours in a row differ
SHARE = 0.55  # of a class's colour in an overlay


def class_colours(names: Sequence[str], palette: Sequence[int] | None = None) -> list[Colour]:
    """A colour for each class: the data's own, else bright ones that differ, and black for a background.

    Args:
        palette: red, green and blue of each class, one after the other.
    """
    if palette is not None and len(palette) == 3 * len(names):
        return [(palette[i], palette[i + 1], palette[i + 2]) for i in range(0, len(palette), 3)]
    return [BLACK if n == 0 and name.lower() in GROUND else _bright(n) for n, name in enumerate(names)]


def _bright(number: int) -> Colour:
    hue, ring = (number * TURN) % 1, number // 12 % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.55, 1.0)[ring], (0.95, 1.0, 0.65)[ring])
    return round(255 * red), round(255 * green), round(255 * blue)


def indexed(mask: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """A mask (height, width) of class indices as a picture whose palette has the classes' colours."""
    picture = Image.fromarray(mask.astype(np.uint8), "L")
    picture.putpalette([channel for colour in colours for channel in colour])
    return picture


def overlay(picture: Image.Image, mask: np.ndarray, colours: Sequence[Colour], width: int) -> Image.Image:
    """A picture scaled to a width, in pixels, with a mask of its size or another laid over it; black classes
    and ignored pixels leave it as it is."""
    size = width, max(1, round(picture.height * width / picture.width))
    ground = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), np.float32)
    small = np.asarray(Image.fromarray(mask.astype(np.uint8), "L").resize(size, Image.Resampling.NEAREST))
    table = np.zeros((IGNORED + 1, 3), np.float32)
    table[: len(colours)] = colours
    drawn = np.asarray(table.any(axis=1))  # (256,)
    shade = SHARE * drawn[small][..., None]  # (height, width, 1)
    return Image.fromarray((ground * (1 - shade) + table[small] * shade).round().astype(np.uint8))
