"""Tracker: what a logger can be told beside numbers; and what of a run may go to it at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

ALLOWED = "lora_allowed"  # what `allow` leaves on a logger


@dataclass(frozen=True)
class Allowed:
    """What of a run may go to a logger beside numbers, words and settings.

    Attributes:
        examples: pictures or sounds of the data, at most so many at a time; 0 is none.
        adapter: what was trained.
        artifact: what that is called there; None is adapter-ID, by the run's id.
    """

    examples: int = 8
    adapter: bool = True
    artifact: str | None = None


@dataclass(frozen=True)
class Example:
    """Something of the data, and what a model makes of it.

    Attributes:
        name: of the picture or recording.
        words: what is true and what was predicted, by a word such as truth, before and after.
        pictures: by such words, all of one size.
        sound: (samples,), if it is one.
        rate: samples of it a second.
    """

    name: str
    words: Mapping[str, str]
    pictures: Mapping[str, Image] = field(default_factory=dict)
    sound: Tensor | None = None
    rate: int = 16_000


@dataclass(frozen=True)
class Confusion:
    """What was taken for what in a part of the data.

    Attributes:
        names: of the classes.
        counts: of each true class, a row, how often it was taken for each, a column.
    """

    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Header and rows."""
        rows = [[name, *row] for name, row in zip(self.names, self.counts, strict=True)]
        return ["true \\ predicted", *self.names], rows


class Tracker:
    """A logger that takes numbers and settings alone; those that take more are its subclasses.

    Every method is for the first process only. One that a logger has no room for does nothing.

    Attributes:
        shows, keeps: whether there is room for examples, and for files.
    """

    shows = keeps = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    @property
    def allowed(self) -> Allowed:
        """What may go to this logger: all, where nobody has said otherwise."""
        return getattr(self.logger, ALLOWED, Allowed())

    def begin(self) -> None:
        """A run begins."""

    def where(self) -> str | None:
        """A line that says where the run goes, and how to see or to upload it."""
        return None

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; one of the same name replaces it."""

    def examples(self, name: str, examples: Sequence[Example]) -> None:
        """What a model makes of some samples."""

    def confusion(self, name: str, found: Confusion) -> None:
        """A confusion matrix; as a table where a logger draws none."""
        self.table(name, *found.table())

    def files(
        self, name: str, files: Mapping[str, Path], aliases: Sequence[str], about: Mapping[str, Any]
    ) -> None:
        """Files that belong together, under a name, such as an adapter.

        Args:
            files: by their names there.
            aliases: by which they are asked for later.
            about: what is known of them, in plain values.
        """

    def summary(self, values: Mapping[str, float]) -> None:
        """The numbers of the whole run."""

    def hide(self, prefix: str) -> None:
        """Draw no charts by itself of the metrics whose names begin so: there are many."""

    def id(self) -> str | None:
        """By which a later process goes on with the run; None where there is no such thing."""
        return None


def allow(logger: Any, allowed: Allowed) -> Any:
    """The logger, to which nothing else goes from now on."""
    setattr(logger, ALLOWED, allowed)
    return logger


@contextlib.contextmanager
def sparing(logger: Any, what: str) -> Iterator[None]:
    """Within this context a logger's failure is a warning: a training that has ended is not lost by a disk
    that is full or a server that does not answer.

    Args:
        what: it is told, in a few words.
    """
    try:
        yield
    except Exception as error:  # of any tracker's library
        name, reason = type(logger).__name__, " ".join(str(error).split())[:300]
        rank_zero_warn(
            f"{name} could not take {what} ({type(error).__name__}: {reason}). Training is not touched by "
            "it, and the files that the run itself writes have everything."
        )


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for loggers that show text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
