"""What a run tells a task of its tests, and the words for the states of a model that a page shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from lora_lightning.adapters.manage import adapters_off
from lora_lightning.adapters.state import is_injected
from lora_lightning.utils.sharding import is_sharded

BEFORE, AFTER, BASE = "before", "after", "base"
EXAMPLES = 12  # samples of a test that a page shows by each order


class Reporting:
    """A task whose tests are shown on a page.

    Attributes:
        pictured: whether a page is made of a test: samples are kept for it, and the model is asked as it was
            before training, too, which takes as long again.
        now: the word for the model as it is: "after", or "base" where nothing was trained.
        kept_examples: how many of the first samples are kept.
        off: gives a context in which an adapter that is not ours is off; None where there is none.
        weights_before: gives a context in which a network that trained in full has its weights of before;
            None where it did not, or nothing has kept them.
    """

    pictured: bool = True
    now: str = AFTER
    kept_examples: int = EXAMPLES
    off: Callable[[], AbstractContextManager[Any]] | None = None
    weights_before: Callable[[], AbstractContextManager[Any]] | None = None

    def can_be_off(self) -> bool:
        """Whether the model has an adapter that can be switched off."""
        assert isinstance(self, nn.Module)
        return self.off is not None or (is_injected(self) and not is_sharded(self))

    def has_before(self) -> bool:
        """Whether the model can be what it was before training."""
        return self.weights_before is not None or self.can_be_off()

    def as_before(self) -> AbstractContextManager[Any]:
        """A context in which the model is what it was before training; where it `has_before`."""
        assert isinstance(self, nn.Module)
        switch = self.weights_before or self.off
        return adapters_off(self) if switch is None else switch()


def in_words(state: str) -> str:
    """`before training`, `after training`, `of the base`."""
    return f"of the {BASE}" if state == BASE else f"{state} training"


def bars_in_words(states: Sequence[str]) -> str:
    """What the bars and marks of a chart are, the last state being what is now."""
    marks = ", the red mark before" * (len(states) > 1)
    return f"The bar is {in_words(states[-1])}, the thin line its 95 % interval{marks}."
