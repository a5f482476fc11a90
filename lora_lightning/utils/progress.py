"""How far long work has come, on stderr: a bar on a terminal or in a notebook, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from lora_lightning.utils.screens import Frame, Screen, screen_of

_open: list[Bar] = []  # those that are not done, the innermost last
DELAY = 0.5  # seconds of work that is shown: what is done sooner needs no bar
Item = TypeVar("Item")


def working(items: Iterable[Item], what: str, unit: str = "", total: int | None = None) -> Iterator[Item]:
    """The items, while it is shown how many of them are done.

    Args:
        what: is done, in a word or two, such as "checking pictures".
        unit: what is counted, in the plural.
        total: how many there are; None asks the items, and shows no share where they do not know.

    Example:
        >>> sum(working([1, 2, 3], "adding", "numbers"))
        6
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(what, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


class Bar:
    """Work in a `with` block, to be told how much of it is done.

    Of bars inside each other the inner one is shown; processes of a distributed run but the first show none.
    Drawing takes at most a hundred and fiftieth of the time.

    Args:
        what: is done, in a word or two.
        total: how much there is, None where that is not known.
        unit: what is counted, in the plural.
        delay: seconds before it is first shown.
        stays: whether a terminal keeps the last state as a line, or clears it. In a file, work that stays is
            told by its milestones.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        unit: str = "",
        delay: float = DELAY,
        stays: bool = False,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.delay, self.stays = delay, stays
        self.done = 0.0
        self.ended = False
        self._start = self._due = 0.0
        self._screen = Screen()

    def __enter__(self) -> Bar:
        self._screen = _open[-1]._screen.inner() if _open else screen_of()
        self._screen.open()
        _open.append(self)
        self._start = time.monotonic()
        self._due = self._start + self._screen.first_wait(self.delay, self.stays)
        return self

    def __exit__(self, *error: Any) -> None:
        self.ended = all(one is None for one in error)
        try:
            if _open[-1] is self:
                self._screen.end(self.frame(), self.stays)
        finally:
            _open.remove(self)
            self._screen.close()

    def advance(self, count: float = 1) -> None:
        """So much more is done."""
        self.done += count
        if (now := time.monotonic()) >= self._due:
            self._show(now)

    def milestone(self) -> None:
        """Something worth a line where lines are written, such as the end of an epoch."""
        self._show(time.monotonic())

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start

    @property
    def share(self) -> float | None:
        """From 0 to 1, None where the total is not known."""
        return min(1.0, self.done / self.total) if self.total else None

    @property
    def remaining(self) -> float | None:
        """Seconds, at the speed so far; None where nothing can be said."""
        share = self.share
        return self.seconds * (1 - share) / share if share else None

    def parts(self) -> list[str]:
        """What is told beside the bar, the most important first: narrow terminals drop the last."""
        count = f"{self.done:,.0f}{f'/{self.total:,.0f}' if self.total else ''}{f' {self.unit}'.rstrip()}"
        parts = [count]
        parts += self.times()
        if self.done and self.seconds:
            parts.append(speed(self.done / self.seconds))
        return parts

    def times(self) -> list[str]:
        """What it has taken when it is done, before that what is left."""
        remaining = self.remaining
        if self.ended or remaining == 0:
            return [clock(self.seconds)]
        return [] if remaining is None else [f"{clock(remaining)} left"]

    def frame(self) -> Frame:
        """What is to be seen now."""
        return Frame(self.what, self.share, self.parts())

    def _show(self, now: float) -> None:
        if _open[-1] is self:
            self._screen.draw(self.frame())
        after = time.monotonic()
        self._due = after + self._screen.next_wait(after - now)


def clock(seconds: float) -> str:
    """`0:09`, `12:34`, `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def speed(rate: float, unit: str = "") -> str:
    """`1,250/s`, `3.2 images/s`, `12 s each`."""
    if rate < 1:
        return f"{1 / rate:.3g} s each"
    number = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
    return f"{number} {unit}/s" if unit else f"{number}/s"
