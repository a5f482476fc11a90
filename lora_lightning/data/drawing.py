"""draw: one picture of shapes, anti-aliased, from a seed; by signed distances, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

DOMAINS = ("source", "target")
CLASSES = ("disc", "square", "triangle", "star")  # the last one is in the target domain alone
FILLS = ("plain", "outline", "stripes", "checks", "dots")
MOST_SHAPES = 6
LEAST_VISIBLE = 0.5  # of a shape, behind those in front of it
RADIUS = (0.04, 0.17)  # of a shape, in sides of the picture
TRIES = 30

Array = np.ndarray
Random = np.random.Generator


def draw(domain: str, side: int, seed: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """One picture of 1 to 6 shapes, the same whenever the arguments are the same.

    Returns:
        Pixels (3, side, side), uint8; boxes (n, 4), float32, x1 y1 x2 y2, each around a whole shape,
        covered or not; labels (n,), from 1, in the order of CLASSES.
    """
    random = np.random.default_rng(seed)
    source = domain == "source"
    image = _even_ground(random, side) if source else _textured_ground(random, side)
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    visible: list[tuple[Array, int]] = []  # what is seen of each shape, and its whole area
    wanted = int(random.integers(1, MOST_SHAPES + 1))
    for _ in range(TRIES):
        if len(boxes) == wanted:
            break
        label = int(random.integers(len(CLASSES) - source))
        u, v, radius = _place(random, side, turn=0.2 if source else math.pi)
        distance = DISTANCES[CLASSES[label]](u, v, radius)
        within = distance < 0
        behind = [(seen & ~within, area) for seen, area in visible]
        if any(seen.sum() < LEAST_VISIBLE * area for seen, area in behind):
            continue
        visible = [*behind, (within, int(within.sum()))]
        labels.append(label + 1)
        boxes.append(_box(within))
        fill = "plain" if source else FILLS[random.integers(len(FILLS))]
        _paint(random, image, (u, v), distance, fill, bright=source)
    if not source:
        image = _photographed(random, image)
    pixels = torch.from_numpy((255 * image.clip(0, 1)).round().astype(np.uint8))
    return pixels, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels)


def _place(random: Random, side: int, turn: float) -> tuple[Array, Array, float]:
    """A shape's radius, and each pixel's coordinates along its own axes, in pixels from its centre."""
    radius = side * random.uniform(*RADIUS)
    x, y = random.uniform(radius + 1, side - radius - 1, 2)
    angle = random.uniform(-turn, turn)
    across, down = np.arange(side)[None] + 0.5 - x, np.arange(side)[:, None] + 0.5 - y
    cos, sin = math.cos(angle), math.sin(angle)
    return across * cos + down * sin, down * cos - across * sin, radius


def _box(within: Array) -> tuple[float, float, float, float]:
    rows, columns = np.nonzero(within.any(1))[0], np.nonzero(within.any(0))[0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _disc(u: Array, v: Array, radius: float) -> Array:
    return np.hypot(u, v) - radius


def _square(u: Array, v: Array, radius: float) -> Array:
    return np.maximum(abs(u), abs(v)) - 0.8 * radius


def _triangle(u: Array, v: Array, radius: float) -> Array:
    return np.maximum(v, abs(u) * math.sqrt(3) / 2 - v / 2) - radius / 2


def _star(u: Array, v: Array, radius: float) -> Array:
    """Of five points: the plane folded into one tenth of it (Quilez, 2D distance functions)."""
    x, y = abs(u), -v
    for kx, ky in ((math.cos(0.2 * math.pi), -math.sin(0.2 * math.pi)),
                   (-math.cos(0.2 * math.pi), -math.sin(0.2 * math.pi))):  # fmt: skip
        over = 2 * np.maximum(kx * x + ky * y, 0)
        x, y = x - over * kx, y - over * ky
    x, y = abs(x), y - radius
    ex, ey = 0.45 * math.sin(0.2 * math.pi), 0.45 * math.cos(0.2 * math.pi) - 1
    along = ((x * ex + y * ey) / (ex * ex + ey * ey)).clip(0, radius)
    return np.hypot(x - ex * along, y - ey * along) * np.sign(y * ex - x * ey)


DISTANCES: dict[str, Callable[[Array, Array, float], Array]] = {
    "disc": _disc, "square": _square, "triangle": _triangle, "star": _star,
}  # fmt: skip


def _even_ground(random: Random, side: int) -> Array:
    return np.broadcast_to(0.5 * random.random((3, 1, 1)), (3, side, side)).copy()


def _textured_ground(random: Random, side: int) -> Array:
    """Noise of several scales, and lines across."""
    image = np.zeros((3, side, side))
    for cells in (2, 5, 11, 23):
        at = np.arange(side)[:, None] * cells / side
        weights = np.maximum(0, 1 - abs(at - np.arange(cells + 1)))  # linear between the cells' corners
        image += weights @ random.random((3, cells + 1, cells + 1)) @ weights.T * (1.2 / cells**0.5)
    image = (image - image.min()) / np.ptp(image)
    image = image * random.uniform(0.5, 1, (3, 1, 1))
    x, y = np.arange(side)[None] + 0.5, np.arange(side)[:, None] + 0.5
    for _ in range(random.integers(3, 9)):
        (x1, y1), (x2, y2) = side * random.random((2, 2))
        dx, dy = x2 - x1, y2 - y1
        along = (((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy + 1e-6)).clip(0, 1)
        distance = np.hypot(x - x1 - along * dx, y - y1 - along * dy) - random.uniform(0.4, 1.2)
        _cover(image, distance, random.random((3, 1, 1)))
    return image


def _paint(
    random: Random, image: Array, axes: tuple[Array, Array], distance: Array, fill: str, bright: bool
) -> None:
    if bright:
        colour = random.uniform(0.5, 1, (3, 1, 1))
    else:
        ground = image[:, distance < 0].mean(1)
        ink = max(random.random((4, 3)), key=lambda c: abs(c - ground).sum())  # one that shows
        colour = _patterned(random, ink[:, None, None], axes, fill)
    if fill == "outline":
        width = random.uniform(1.5, 2.8)
        distance = abs(distance + width / 2) - width / 2
    _cover(image, distance, colour)


def _patterned(random: Random, ink: Array, axes: tuple[Array, Array], fill: str) -> Array:
    other = random.random((3, 1, 1))
    u, v = (axis * 2 * math.pi / random.uniform(4, 9) for axis in axes)
    waves = {"stripes": np.sin(u), "checks": 2 * np.sin(u) * np.sin(v), "dots": np.cos(u) + np.cos(v) - 0.8}
    if fill not in waves:
        return ink
    share = (0.5 + waves[fill]).clip(0, 1)
    return ink * share + other * (1 - share)


def _cover(image: Array, distance: Array, colour: Array) -> None:
    """Paint where the distance is negative, with edges smoothed over a pixel."""
    share = (0.5 - distance).clip(0, 1)
    image += share * (colour - image)


def _photographed(random: Random, image: Array) -> Array:
    """Uneven light, a little blur, noise."""
    side = image.shape[1]
    slope = np.linspace(-1, 1, side)
    (across, down) = random.uniform(-0.3, 0.3, 2)
    image = image * (1 + across * slope[None] + down * slope[:, None])
    blur = random.uniform(0, 0.25)
    for axis in (1, 2):
        beside = (np.roll(image, 1, axis) + np.roll(image, -1, axis)) / 2
        image = image + blur * (beside - image)
    return image + random.uniform(0.02, 0.06) * random.standard_normal(image.shape)
