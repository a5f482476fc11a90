"""What a run tells a task of its tests, and the words for the states of a model that a page shows."""

from __future__ import annotations

from collections.abc import Sequence

BEFORE, AFTER, BASE = "before", "after", "base"


class Reporting:
    """A task whose tests are shown on a page.

    Attributes:
        asks_before: whether a test of an adapted model also asks it with the adapter off, which takes as long
            again.
        now: the word for the model as it is: "after", or "base" where nothing was trained.
    """

    asks_before: bool = True
    now: str = AFTER


def in_words(state: str) -> str:
    """`before training`, `after training`, `of the base`."""
    return f"of the {BASE}" if state == BASE else f"{state} training"


def bars_in_words(states: Sequence[str]) -> str:
    """What the bars and marks of a chart are, the last state being what is now."""
    marks = ", the red mark before" * (len(states) > 1)
    return f"The bar is {in_words(states[-1])}, the thin line its 95 % interval{marks}."
