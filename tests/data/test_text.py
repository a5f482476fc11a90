"""Normalization of transcripts: written down, its own normal form, and honest about what is left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.data.text import BLANK, normalize, unknown, vocabulary_of

ENGLISH = [BLANK, " ", *"abcdefghijklmnopqrstuvwxyz'"]


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("Author of the danger trail, Philip Steels, etc.", "author of the danger trail philip steels etc"),
        ("It’s a well-known fact — isn't it?", "it's a well known fact isn't it"),
        ("'Twas said: 'no'", "'twas said no"),
        ("  ﬁve\tcafés\n", "five cafes"),
        ("Straße 12", "straße 12"),
        ("... !", ""),
    ],
)
def test_normal_form(written, normal):
    assert normalize(written, ENGLISH) == normal


def test_accents_stay_where_the_vocabulary_has_them():
    assert normalize("Café", [*ENGLISH, "é"]) == "café"


@given(st.text(max_size=40))
def test_a_normal_form_is_its_own(text):
    for vocabulary in (None, ENGLISH):
        once = normalize(text, vocabulary)
        assert normalize(once, vocabulary) == once
        assert once == " ".join(once.split())


def test_what_is_lacking_is_counted():
    texts = [normalize(t, ENGLISH) for t in ("Room 101", "naïve œuvre", "fine")]
    assert unknown(texts, ENGLISH) == {"1": 2, "0": 1, "œ": 1}
    assert vocabulary_of(["ab a", "b"]) == [BLANK, " ", "a", "b"]
