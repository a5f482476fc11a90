"""lightning.pytorch and pytorch_lightning: two packages with the same classes, which are not the same."""

from __future__ import annotations


def is_a(thing: object, *names: str) -> bool:
    """Whether `thing` is an instance of one of these classes of Lightning, of whichever package."""
    return any(
        c.__name__ in names and c.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        for c in type(thing).__mro__
    )
