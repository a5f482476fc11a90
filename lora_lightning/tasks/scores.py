"""Score: a number by which a task is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Score(NamedTuple):
    """A score of a task, which logs it as `val/NAME` and `test/NAME`.

    A task lists its scores in its class attribute `scores`, the one that counts most first.
    """

    name: str
    label: str  # the head of its column: "accuracy %"
    scale: float = 100  # from what is logged to what is shown
    digits: int = 1
    fewer: bool = False  # an error rate: the table also says how much of it the model before it has lost
    best: str = "max"  # or "min": which of two values is better, as callbacks have it
    in_table: bool = True  # of results; else in results.json and on the page alone

    def show(self, value: float | None, interval: Sequence[float] | None = None) -> str:
        """The value as it stands in a table, without its unit, with its interval if there is one; a dash
        for None."""
        if value is None:
            return "–"
        low, high = (f"{self.scale * bound:.{self.digits}f}" for bound in interval or (value, value))
        between = " to " if low.startswith("-") else "–"
        return f"{self.scale * value:.{self.digits}f}" + (f" ({low}{between}{high})" if interval else "")
