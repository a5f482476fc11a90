"""Marks that say in an annotation what an option may be, and the check that a type with its marks stands for.

    domain: Literal["source", "target"]
    size: Annotated[int, between(1, 900)]
    head_lr: Annotated[float | None, above(0), Null("lr")]

A type is a check by itself; marks in `Annotated` narrow it, and a `Check` among them takes its place. What is
no single plain type has no check without one. `lora_lightning.utils.checks` asks them. Loads nothing heavy:
the application reads the same annotations from the source, before torch is loaded.
"""

from __future__ import annotations

import math
import os
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from typing_extensions import Self

from lora_lightning.errors import did_you_mean

Show = Callable[[Any], str]


@dataclass(frozen=True)
class Check:
    """What a value may be.

    Args:
        allowed: in words that follow "give".
        test: whether a value is allowed.
        names: the choices, for near misses and for completion.
        near: what was meant by a wrong value, as a sentence with a leading space; None asks `names`.
        null: whether None is allowed too.
        details: what is wrong within a value that passes the test: (option, value, how values are shown) ->
            one line each.
    """

    allowed: str
    test: Callable[[Any], bool]
    names: tuple[str, ...] = ()
    near: Callable[[Any], str] | None = None
    null: bool = False
    details: Callable[[str, Any, Show], list[str]] | None = None

    def allows(self, value: Any) -> bool:
        """Whether this may be the value."""
        return not self.problems("", value)

    def problems(self, name: str, value: Any, show: Show = repr) -> list[str]:
        """One line for each thing that is wrong: the option, the value, what is allowed, the near miss."""
        if value is None and self.null:
            return []
        if self.test(value):
            return self.details(name, value, show) if self.details else []
        return [f"{name}={show(value)}: {self.remedy(value)}"]

    def remedy(self, value: Any) -> str:
        """What to give in place of a wrong value, and what was meant by it."""
        near = self.near or (lambda v: did_you_mean(v, self.names) if isinstance(v, str) else "")
        return f"give {self.allowed}.{near(value)}"

    def or_null(self, meaning: str = "") -> Self:
        """The same, or None, which may have a meaning of its own."""
        return replace(self, allowed=f"{self.allowed}, or null{meaning and f' for {meaning}'}", null=True)


class Bounds(NamedTuple):
    """A mark: between which numbers one lies, in words and as a test; what the number is, and a note."""

    words: str
    test: Callable[[float], bool]
    noun: str = ""
    note: str = ""


class Null(NamedTuple):
    """A mark: what None means, in words that follow "null for"."""

    meaning: str


def at_least(low: float, below: float = math.inf, *, noun: str = "", note: str = "") -> Bounds:
    """low <= value < below."""
    return Bounds(f"of at least {low:.12g}{_below(below)}", lambda v: low <= v < below, noun, note)


def above(
    low: float, below: float = math.inf, *, most: float = math.inf, noun: str = "", note: str = ""
) -> Bounds:
    """low < value < below, and value <= most."""
    words = f"above {low:.12g}{_below(below)}" + (f" and at most {most:.12g}" if most < math.inf else "")
    return Bounds(words, lambda v: low < v < below and v <= most, noun, note)


def between(low: float, high: float, *, noun: str = "", note: str = "") -> Bounds:
    """low <= value <= high."""
    return Bounds(f"from {low:.12g} to {high:.12g}", lambda v: low <= v <= high, noun, note)


def _below(limit: float) -> str:
    return "" if limit == math.inf else f" and below {limit:.12g}"


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether this is a finite number of Python's, and no truth value."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


FLAG = Check("true or false", lambda v: isinstance(v, bool), ("true", "false"))
TEXT = Check("a text", _is_text)


def whole(*marks: Bounds) -> Check:
    return _bounded("a whole number", is_whole, marks)


def number(*marks: Bounds) -> Check:
    return _bounded("a number", is_number, marks)


def _bounded(noun: str, kind: Callable[[Any], bool], marks: Sequence[Bounds]) -> Check:
    words = [next((m.noun for m in marks if m.noun), noun), *(m.words for m in marks)]
    notes = [f"; {m.note}" for m in marks if m.note]
    return Check(" ".join(words) + "".join(notes), lambda v: kind(v) and all(m.test(v) for m in marks))


def one_of(*names: str, several: bool = False) -> Check:
    """One of these texts; with `several`, a list of them may be given, too."""
    one = Check(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names, names)
    return listed(f"one or several of {', '.join(names)}", one, alone=True) if several else one


def either(check: Check, allowed: str, *, words: Sequence[str] = (), share: str = "") -> Check:
    """What a check allows, or one of these words, or with `share` a text such as `energy:0.9` with a number
    between 0 and 1.

    Args:
        allowed: the words, as they follow "give" and what the check allows.
    """

    def test(value: Any) -> bool:
        if not isinstance(value, str):
            return check.test(value)
        name, _, number = value.partition(":")
        return value in words or (name == share != "" and _is_share(number))

    return Check(f"{check.allowed}; {allowed}", test, tuple(words))


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def multiple_of(step: int) -> Check:
    """A whole number of steps, at least one."""

    def near(value: Any) -> str:
        lower = value // step * step if is_whole(value) and value > step else step
        return f" Did you mean {lower}?"

    return Check(f"a multiple of {step}", lambda v: is_whole(v) and v > 0 and v % step == 0, near=near)


def path(what: str = "a folder") -> Check:
    """The name of a file or folder; whether it exists is seen when it is used."""
    return Check(what, lambda v: isinstance(v, (str, os.PathLike)) and bool(str(v)))


def matching(pattern: str, what: str) -> Check:
    """A text that a regular expression matches whole."""
    return Check(what, lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None)


def listed(
    allowed: str,
    each: Check,
    *,
    count: int | None = None,
    ascending: bool = False,
    distinct: bool = False,
    least: int = 1,
    alone: bool = False,
) -> Check:
    """A list in which each value passes a check.

    Args:
        allowed: the whole, in words that follow "give".
        each: of every value.
        count: how many there are.
        ascending, distinct: how they are to each other.
        least: how many there are at least.
        alone: a value of its own stands for a list of one.
    """

    def test(value: Any) -> bool:
        if alone and each.allows(value):
            return True
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            return False
        if len(value) < least or (count is not None and len(value) != count):
            return False
        if not all(map(each.allows, value)):
            return False
        return not (ascending and list(value) != sorted(value)) and not (
            distinct and len(set(value)) < len(value)
        )

    def near(value: Any) -> str:
        values = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else ()
        wrong = [v for v in values if not each.allows(v)]
        return did_you_mean(wrong[0], each.names) if wrong and isinstance(wrong[0], str) else ""

    return Check(allowed, test, each.names, near)


def weights_of(*names: str) -> Check:
    """A mapping of some of these names to weights: finite numbers of at least 0."""
    weight = number(at_least(0, noun="a finite weight"))

    def details(name: str, value: Any, show: Show) -> list[str]:
        return [problem for key, given in value.items() for problem in one(name, key, given, show)]

    def one(name: str, key: Any, given: Any, show: Show) -> list[str]:
        if key in names:
            return weight.problems(f"{name}.{key}", given, show)
        return [f"{name}: give no {key!r}, but some of {', '.join(names)}.{did_you_mean(str(key), names)}"]

    words = f"a mapping to weights, such as {{{names[0]}: 1.0e-4}}"
    return Check(words, lambda v: isinstance(v, dict), names, details=details)


# What an annotation may call, also where it is read from its source: they make marks of constants.
MARKS = (
    at_least,
    above,
    between,
    whole,
    number,
    one_of,
    either,
    multiple_of,
    path,
    matching,
    listed,
    weights_of,
    Null,
)
PLAIN: dict[type, Callable[[Sequence[Bounds]], Check]] = {
    bool: lambda marks: FLAG,
    int: lambda marks: whole(*marks),
    float: lambda marks: number(*marks),
    str: lambda marks: TEXT,
}  # fmt: skip


def check_of(hint: Any) -> Check | None:
    """The check that a type with its marks stands for; None where anything goes."""
    kinds, marks, nullable = _taken_apart(hint)
    given = [mark for mark in marks if isinstance(mark, Check)]
    if given:
        check = given[0]
    elif len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        check = one_of(*get_args(kinds[0]))
    elif len(kinds) == 1 and kinds[0] in PLAIN:
        check = PLAIN[kinds[0]]([mark for mark in marks if isinstance(mark, Bounds)])
    else:
        return None
    meaning = next((mark.meaning for mark in marks if isinstance(mark, Null)), "")
    return check.or_null(meaning) if nullable else check


def _taken_apart(hint: Any) -> tuple[list[Any], list[Any], bool]:
    """The types of a union but None, every mark on it, and whether None is among them."""
    if get_origin(hint) is Annotated:
        inner, *own = get_args(hint)
        kinds, marks, nullable = _taken_apart(inner)
        return kinds, [*marks, *own], nullable
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_taken_apart(part) for part in get_args(hint)]
        return (
            [kind for kinds, _, _ in parts for kind in kinds],
            [mark for _, marks, _ in parts for mark in marks],
            any(nullable for _, _, nullable in parts),
        )
    return ([], [], True) if hint in (None, type(None)) else ([hint], [], False)


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{show(v)}" for k, v in value.items()) + "}"
    return repr(value) if value == "" else str(value)
