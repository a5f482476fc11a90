"""Examples for trackers: pictures of one size, so that they stand in rows."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

SIDE = 256  # pixels of a picture
PAPER = "#808080"  # beside one that is not square


def framed(picture: Image.Image) -> Image.Image:
    """A picture, whole and in its proportions, in the middle of a square."""
    factor = SIDE / max(picture.size)
    size = max(1, round(factor * picture.width)), max(1, round(factor * picture.height))
    smooth = Image.Resampling.BICUBIC if factor < 1 else Image.Resampling.NEAREST
    fitted = picture.convert("RGB").resize(size, smooth)
    square = Image.new("RGB", (SIDE, SIDE), PAPER)
    square.paste(fitted, ((SIDE - fitted.width) // 2, (SIDE - fitted.height) // 2))
    return square


def all_framed(pictures: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """Several of them."""
    return {name: framed(picture) for name, picture in pictures.items()}
