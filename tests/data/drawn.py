"""Tiny drawn photographs, in folders of classes, for the tests of pictures of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 24


def photo(kind: str, number: int, side: int = SIDE) -> Image.Image:
    """A disc, a square or a triangle, bright on a dark mottled ground; different for each number."""
    random = np.random.default_rng((sum(map(ord, kind)), number))
    ground = Image.fromarray(random.integers(0, 90, (4, 4, 3), np.uint8))
    picture = ground.resize((side, side), Image.Resampling.BICUBIC)
    width = int(random.integers(side // 2, side * 3 // 4))
    left, top = (int(random.integers(1, side - width)) for _ in range(2))
    box = (left, top, left + width, top + width)
    colour = tuple(int(c) for c in random.integers(150, 256, 3))
    draw = ImageDraw.Draw(picture)
    if kind.startswith("disc"):
        draw.ellipse(box, fill=colour)
    elif kind.startswith("square"):
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon(
            [(left, top + width), (left + width, top + width), (left + width // 2, top)], fill=colour
        )
    return picture


def folders(root: Path, counts: Mapping[str, int]) -> Path:
    """`counts` photographs in folders, PNG: {"train/disc": 5} makes root/train/disc/0.png to 4.png."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            photo(Path(folder).name, number + 1000 * sum(map(ord, folder))).save(
                root / folder / f"{number}.png"
            )
    return root
