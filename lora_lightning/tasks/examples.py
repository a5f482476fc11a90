"""Samples of a test that are kept to be shown, and pictures of one size for trackers' rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from PIL import Image

SIDE = 256  # pixels of a picture
PAPER = "#808080"  # beside one that is not square
T = TypeVar("T")


class Kept(Generic[T]):
    """Of the samples of a test the first and the worst.

    Args:
        first, worst: how many.

    Attributes:
        count: how many there were.
        first: in their order.
        worst: badness, place and sample, the worst first, of equal ones the earlier.
    """

    def __init__(self, first: int, worst: int) -> None:
        self.count = 0
        self.first: list[T] = []
        self.worst: list[tuple[float, int, T]] = []
        self._room = first, worst

    def add(self, badness: float, make: Callable[[], T]) -> None:
        """The next sample.

        Args:
            badness: the greater, the worse.
            make: gives what is kept; it is asked only where the sample is.
        """
        first, worst = self._room
        place, self.count = self.count, self.count + 1
        begins = place < first
        is_bad = len(self.worst) < worst or badness > self.worst[-1][0]
        if not (begins or is_bad):
            return
        one = make()
        if begins:
            self.first.append(one)
        if is_bad:
            self.worst = sorted([*self.worst, (badness, place, one)], key=lambda w: (-w[0], w[1]))[:worst]


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
