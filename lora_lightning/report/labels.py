"""Where the labels of boxes go in a picture, so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Rect = tuple[float, float, float, float]  # left, top, right, bottom
STEPS = 9  # places that are tried along an edge of a box


def placed(
    boxes: Sequence[Sequence[float]],
    sizes: Sequence[tuple[float, float]],
    width: float,
    height: float,
) -> list[Rect | None]:
    """A place for the label of each box, within the picture and touching its box; None where none is free.

    The first come first: where a label goes does not depend on the boxes behind it. Of boxes in the order of
    their scores, the labels of the surest ones therefore stay where they are, however many are shown.

    Args:
        boxes: left, top, right, bottom of each.
        sizes: width and height of each label.
        width, height: of the picture.
    """
    found: list[Rect | None] = []
    taken = np.empty((0, 4))
    for box, (wide, high) in zip(boxes, sizes, strict=True):
        if wide > width or high > height:
            found.append(None)
            continue
        places = _around(box, wide, high, width, height)
        free = ~_meet(places, taken).any(1) & _meet(places, np.array([box], dtype=float), 1.0)[:, 0]
        if not free.any():
            found.append(None)
            continue
        best = places[free.argmax()]
        taken = np.vstack([taken, best])
        left, top, right, bottom = best.tolist()
        found.append((left, top, right, bottom))
    return found


def _around(box: Sequence[float], wide: float, high: float, width: float, height: float) -> np.ndarray:
    """(places, 4), the best first: on the upper edge from its left end, on the lower one, within, beside."""
    left, top, right, bottom = box
    along = np.linspace(left, right - wide, STEPS) if right - left > wide else np.array([left, right - wide])
    beside = np.linspace(top, bottom - high, STEPS) if bottom - top > high else np.array([top, bottom - high])
    rows = [(x, y) for y in (top - high, bottom, top, bottom - high) for x in along]
    rows += [(x, y) for x in (right, left - wide) for y in beside]
    rows += [(x, y) for y in (top - high, bottom) for x in (left - wide, right)]
    corners = np.array(rows, dtype=float)
    corners = corners.clip(0, (width - wide, height - high))
    return np.hstack([corners, corners + np.array([wide, high])])


def _meet(some: np.ndarray, others: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """(some, others), whether they overlap, or come as near as `slack`."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    return (high - low > -slack).all(2) if slack else (high - low > 1e-9).all(2)
