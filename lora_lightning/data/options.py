"""What the options of the data modules may be: each check gives a problem as one line, or None."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from lora_lightning.errors import did_you_mean


def whole(name: str, value: Any, least: int, also: str = "") -> str | None:
    """A whole number of at least `least`; `also` names what else is allowed, such as "or null"."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return None
    return f"{name}={value!r}: give a whole number of at least {least}{also and f', {also}'}."


def number(value: Any) -> bool:
    """Whether this is a finite number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def probability(name: str, value: Any) -> str | None:
    if number(value) and 0 <= value <= 1:
        return None
    return f"{name}={value!r}: give a probability from 0 to 1."


def flag(name: str, value: Any) -> str | None:
    return None if isinstance(value, bool) else f"{name}={value!r}: give true or false."


def path(name: str, value: Any, what: str = "a folder") -> str | None:
    return None if isinstance(value, (str, os.PathLike)) and str(value) else f"{name}={value!r}: give {what}."


def one_of(name: str, value: Any, names: Iterable[str]) -> str | None:
    known = list(names)
    if isinstance(value, str) and value in known:
        return None
    return f"{name}={value!r}: give one of {', '.join(known)}.{did_you_mean(str(value), known)}"
