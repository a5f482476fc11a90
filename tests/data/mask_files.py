"""Small pictures with masks: a disc of class 1 and a box of class 2 on ground of class 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["ground", "disc", "box"]
COLOURS = [(0, 0, 0), (200, 30, 30), (30, 30, 200)]
PALETTE = [channel for colour in COLOURS for channel in colour]


def drawn(number: int, size: tuple[int, int] = (32, 24)) -> tuple[Image.Image, np.ndarray]:
    """A picture of (width, height) and its mask of indices; the first row is of no class, 255."""
    width, height = size
    random = np.random.default_rng(number)
    pixels = random.integers(60, 110, (height, width, 3))
    mask = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    y, x = random.integers(8, height - 6), random.integers(6, width - 6)
    mask[(rows - y) ** 2 + (columns - x) ** 2 < 30] = 1
    y, x = random.integers(8, height - 6), random.integers(6, width - 6)
    mask[y - 4 : y + 4, x - 4 : x + 4] = 2
    for index, colour in enumerate(COLOURS[1:], 1):
        pixels[mask == index] = np.array(colour) + 30
    mask[0] = 255
    return Image.fromarray(pixels.astype(np.uint8)), mask


def save_mask(mask: np.ndarray, file: Path, kind: str = "palette") -> None:
    """As a PNG: "palette", "grey", or "colour", where 255 is white."""
    image = Image.fromarray(mask)
    if kind == "palette":
        image.putpalette([*PALETTE, *[255] * (768 - len(PALETTE))])
    if kind == "colour":
        table = np.full((256, 3), 255, np.uint8)
        table[:3] = COLOURS
        image = Image.fromarray(table[mask])
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def write_pairs(
    root: Path,
    count: int = 12,
    parts: Sequence[str] = ("",),
    kind: str = "palette",
    size: tuple[int, int] = (32, 24),
    suffix: str = "",
) -> Path:
    """`count` pairs in each part: root/PART/images and root/PART/masks; wide and high ones in turn."""
    for place, part in enumerate(parts):
        for number in range(count):
            picture, mask = drawn(1000 * place + number, size if number % 2 else size[::-1])
            folder = root / part / "images"
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{number:03d}.png")
            save_mask(mask, root / part / "masks" / f"{number:03d}{suffix}.png", kind)
    return root
