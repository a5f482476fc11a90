"""Error rates against two libraries, the bootstrap against theory, confusions by hand."""

from __future__ import annotations

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.text import CharErrorRate, WordErrorRate

from lora_lightning.tasks.error_rates import Transcript, bootstrap, confusions, count_errors, error_rate

WORDS = st.lists(st.sampled_from(["one", "two", "three", "on", "o"]), max_size=6).map(" ".join)
SAID = WORDS.filter(bool)


def heard(*pairs: tuple[str, str]) -> list[Transcript]:
    return [Transcript(str(i), "us", f"s{i % 3}", said, text) for i, (said, text) in enumerate(pairs)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SAID, WORDS), min_size=1, max_size=8))
def test_three_libraries_agree(pairs: list[tuple[str, str]]) -> None:
    said, texts = [p[0] for p in pairs], [p[1] for p in pairs]
    words, characters = WordErrorRate(), CharErrorRate()
    words.update(texts, said)
    characters.update(texts, said)
    transcripts = heard(*pairs)
    assert error_rate(transcripts).rate == pytest.approx(words.compute().item(), abs=1e-6)
    assert error_rate(transcripts).rate == pytest.approx(jiwer.wer(said, texts))
    assert error_rate(transcripts, "character").rate == pytest.approx(characters.compute().item(), abs=1e-6)
    assert error_rate(transcripts, "character").rate == pytest.approx(jiwer.cer(said, texts))


def test_silence_counts_what_was_heard_in_it() -> None:
    errors, lengths = count_errors(heard(("", "one two"), ("one", "")))
    assert errors.tolist() == [2, 1]
    assert lengths.tolist() == [0, 1]
    assert error_rate(heard(("", "one"))).rate == 1


def test_the_interval_is_that_of_a_binomial() -> None:
    """200 utterances of 5 words, each wrong with probability 0.2, independently: ± 1.96 sqrt(pq/n)."""
    draw = np.random.default_rng(1)
    widths, covered = [], 0
    for _ in range(60):
        errors = draw.binomial(5, 0.2, 200)
        interval = bootstrap(errors, np.full(200, 5))
        widths.append(interval.high - interval.low)
        covered += interval.low <= 0.2 <= interval.high
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.2 * 0.8 / 1000), rel=0.05)
    assert covered >= 52  # 57 are expected; fewer than 52 once in 100


def test_speakers_that_differ_widen_the_interval() -> None:
    errors = np.repeat([0, 5, 1, 4], 50)
    lengths = np.full(200, 5)
    speakers = [f"s{i // 50}" for i in range(200)]
    by_utterance, by_speaker = bootstrap(errors, lengths), bootstrap(errors, lengths, speakers)
    assert by_utterance.rate == by_speaker.rate == 0.5
    assert by_speaker.high - by_speaker.low > 3 * (by_utterance.high - by_utterance.low)


def test_the_interval_is_the_same_each_time() -> None:
    assert error_rate(heard(("a b", "a"), ("c", "c"))) == error_rate(heard(("a b", "a"), ("c", "c")))


def test_confusions() -> None:
    found = confusions(heard(("turn left now", "turn lift"), ("left", "lift"), ("one", "one more")))
    assert found == {("left", "lift"): 2, ("now", ""): 1, ("", "more"): 1}
