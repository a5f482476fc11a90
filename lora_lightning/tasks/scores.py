"""Score: a number by which a task is judged."""

from __future__ import annotations

from typing import NamedTuple


class Score(NamedTuple):
    """A score of a task, which logs it as `val/NAME` and `test/NAME`.

    A task lists its scores in its class attribute `scores`, the one that counts most first.
    """

    name: str
    label: str  # the head of its column: "accuracy %"
    scale: float = 100  # from what is logged to what is shown
    digits: int = 1

    def show(self, value: float | None) -> str:
        """The value as it stands in a table, without its unit; a dash for None."""
        return "–" if value is None else f"{self.scale * value:.{self.digits}f}"
