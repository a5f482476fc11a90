"""Tables in plain text."""

import pytest

from lora_lightning.utils.tables import format_table, percent, truncate_list


def test_numbers_stand_right_and_words_left():
    assert format_table(("name", "count"), [("a", "1,000"), ("longer", 7)]).splitlines() == [
        "name    count",
        "──────  ─────",
        "a       1,000",
        "longer      7",
    ]


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(41, 10000, "0.41 %"), (1, 2, "50 %"), (0, 5, "0 %"), (1, 0, "0 %"), (1, 10**6, "0.0001 %")],
)
def test_percent(part, whole, text):
    assert percent(part, whole) == text


def test_long_lists_are_cut():
    assert truncate_list(["a", "b"]) == "a, b"
    assert truncate_list(list("abcdef")) == "a, b, c, d and 2 more"
