"""What types and their marks allow, and how a problem reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union

import pytest

from lora_lightning.utils.marks import (
    TEXT,
    Null,
    above,
    at_least,
    between,
    check_of,
    listed,
    matching,
    multiple_of,
    number,
    one_of,
    path,
    show,
)

LISTS = listed("two numbers, rising", number(between(0, 1)), count=2, ascending=True)


@pytest.mark.parametrize(
    ("hint", "good", "bad", "told"),
    [
        (bool, [True], [1, None, "yes"], "give true or false."),
        (int, [0, -3], [True, 1.0, "1", None], "give a whole number."),
        (float, [0, 1.5], [True, float("nan"), float("inf"), 10**400, "1"], "give a number."),
        (str, ["a"], ["", " ", 3], "give a text."),
        (Annotated[int, at_least(1, note="8 is usual")], [1], [0, 1.0], "of at least 1; 8 is usual."),
        (Annotated[float, above(0, below=0.5, noun="a share")], [0.1], [0, 0.5], "a share above 0 and"),
        (Annotated[float | None, above(0), Null("lr")], [1, None], [0], "a number above 0, or null for lr."),
        (Annotated[int, at_least(1)] | None, [1, None], [0], "of at least 1, or null."),
        (Union[Annotated[int, between(1, 9)], None], [9, None], [10], "from 1 to 9, or null."),  # noqa: UP007
        (Literal["soft", "hard"], ["soft"], ["sof", 3], "give one of soft, hard."),
        (Annotated[str, one_of("a", "b")], ["b"], ["c", ["a"]], "give one of a, b."),
        (Annotated[Any, one_of("a", "b", several=True)], ["b", ["a", "b"]], ["c", ["c"], []], "several of a"),
        (Annotated[int, multiple_of(32)], [64], [0, 33, 64.0], "give a multiple of 32."),
        (Annotated[str, path("a file")], ["x"], ["", 3, None], "give a file."),
        (Annotated[Sequence[float], LISTS], [[0, 1], (0.5, 0.5)], [[1, 0], [1], "01", [2, 3]], "rising."),
        (Annotated[Any, listed("names", TEXT, distinct=True)], [["a"]], [["a", "a"], [], [3]], "give names."),
        (Annotated[str, matching("[a-z]+", "a word")], ["ab"], ["a b", 3], "give a word."),
    ],
)  # fmt: skip
def test_what_is_allowed_and_what_is_said(hint: Any, good: list[Any], bad: list[Any], told: str) -> None:
    check = check_of(hint)
    assert check is not None
    assert [value for value in good if check.problems("option", value)] == []
    for value in bad:
        (line,) = check.problems("option", value)
        assert line.startswith(f"option={value!r}: give ") and told in line


@pytest.mark.parametrize("hint", [Any, int | str, Sequence[str], dict[str, int], object, None])
def test_what_is_no_plain_type_is_not_checked(hint: Any) -> None:
    assert check_of(hint) is None


@pytest.mark.parametrize(
    ("hint", "value", "near"),
    [
        (Literal["source", "target"], "targt", "'target'"),
        (Annotated[Any, one_of("speaker", "text", several=True)], ["speker"], "'speaker'"),
        (Annotated[int, multiple_of(32)], 100, "96"),
        (Annotated[int, multiple_of(32)], 3, "32"),
        (bool, "ture", "'true'"),
    ],
)
def test_near_misses(hint: Any, value: Any, near: str) -> None:
    check = check_of(hint)
    assert check is not None
    assert check.problems("option", value)[0].endswith(f" Did you mean {near}?")


def test_values_are_shown_as_they_are_written_there() -> None:
    assert [show(v) for v in (None, True, "a", "", [1, None], {"a": False}, 0.5)] == [
        "null", "true", "a", "''", "[1,null]", "{a:false}", "0.5",
    ]  # fmt: skip
