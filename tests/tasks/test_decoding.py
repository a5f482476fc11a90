"""Beam search against the sum over every path, with and without a language model and a lexicon."""

import itertools
import math

import numpy as np
import pytest
import torch

from lora_lightning.errors import ConfigError, MissingFileError, UserError
from lora_lightning.tasks.decoding import BeamDecoder, NGram
from lora_lightning.tasks.vocabulary import greedy

SYMBOLS = ["<blank>", " ", "a", "b"]
ARPA = r"""
\data\
ngram 1=5
ngram 2=4

\1-grams:
-1.2	<unk>
-99	<s>	-0.3
-0.7	</s>
-0.5	a	-0.2
-0.9	ab	-0.4

\2-grams:
-0.2	<s> ab
-0.6	a ab
-0.8	ab a
-0.1	ab </s>

\end\
"""


def outputs(frames: int, seed: int, sharpness: float = 1.5) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(frames, 4)) * sharpness
    return values - np.logaddexp.reduce(values, 1, keepdims=True)


def by_paths(log_probs: np.ndarray, bonus=lambda text: 0.0, allowed=lambda text: True) -> dict[str, float]:
    """ln of the summed probability of every text, from every path; spaces at the ends count for nothing."""
    totals: dict[str, float] = {}
    for path in itertools.product(range(4), repeat=len(log_probs)):
        text = "".join(SYMBOLS[i] for i, _ in itertools.groupby(path) if i)
        text = " ".join(text.split())
        if allowed(text):
            value = sum(log_probs[t, i] for t, i in enumerate(path))
            totals[text] = np.logaddexp(totals.get(text, -math.inf), value)
    return {text: value + bonus(text) for text, value in totals.items()}


def assert_same(found, expected) -> None:
    ranked = sorted(expected.items(), key=lambda item: -item[1])
    assert [text for text, _ in found] == [text for text, _ in ranked[: len(found)]]
    assert [value for _, value in found] == pytest.approx(
        [value for _, value in ranked[: len(found)]], abs=1e-9
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_sum_over_all_paths(seed):
    log_probs = outputs(5, seed)
    found = BeamDecoder(beam=10_000, least=-math.inf).best(log_probs, SYMBOLS, 5)
    assert_same(found, by_paths(log_probs))


@pytest.mark.parametrize("seed", range(4))
def test_with_a_lexicon(seed):
    words = {"ab", "b", "bab"}
    log_probs = outputs(5, seed)
    found = BeamDecoder(beam=10_000, least=-math.inf, lexicon=words).best(log_probs, SYMBOLS, 4)
    assert_same(found, by_paths(log_probs, allowed=lambda text: set(text.split()) <= words))


@pytest.mark.parametrize("seed", range(4))
def test_with_a_language_model(seed, tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    lm = NGram.read(tmp_path / "lm.arpa")

    def bonus(text: str) -> float:
        context, total = ("<s>",), 0.0
        for word in [*text.split(), "</s>"]:
            value, context = lm.score(context, word)
            total += 0.7 * value + 0.4 * (word != "</s>")
        return total

    log_probs = outputs(5, seed)
    decoder = BeamDecoder(
        beam=10_000, least=-math.inf, lm=tmp_path / "lm.arpa", lm_weight=0.7, word_bonus=0.4
    )
    assert_same(decoder.best(log_probs, SYMBOLS, 5), by_paths(log_probs, bonus))


def test_back_off(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    lm = NGram.read(tmp_path / "lm.arpa")
    assert lm.score(("<s>",), "ab") == (pytest.approx(-0.2 * math.log(10)), ("ab",))
    assert lm.score(("a",), "a")[0] == pytest.approx((-0.2 - 0.5) * math.log(10))
    assert lm.score(("ab",), "zebra") == (pytest.approx(-1.2 * math.log(10)), ("zebra",))
    assert lm.score(("zebra",), "a")[0] == pytest.approx(-0.5 * math.log(10))


def test_a_narrow_beam_is_hardly_worse_than_a_wide_one():
    for seed in range(5):
        log_probs = outputs(30, seed, 4.0)
        narrow = BeamDecoder(beam=16).best(log_probs, SYMBOLS)[0][1]
        wide = BeamDecoder(beam=150, least=-30.0).best(log_probs, SYMBOLS)[0][1]
        assert wide - 0.5 < narrow <= wide + 1e-9


def test_batches_and_lengths():
    log_probs = torch.from_numpy(np.stack([outputs(9, s, 6.0) for s in range(3)]))
    lengths = torch.tensor([9, 4, 7])
    texts = BeamDecoder(beam=64)(log_probs, lengths, SYMBOLS)
    alone = [
        BeamDecoder(beam=64)(log_probs[i : i + 1, :n], torch.tensor([n]), SYMBOLS)[0]
        for i, n in enumerate([9, 4, 7])
    ]
    assert texts == alone
    pipes = ["<blank>", "|", "a", "b"]
    assert BeamDecoder(beam=64)(log_probs, lengths, pipes) == texts
    sharp = torch.full((1, 6, 4), -20.0)
    for t, i in enumerate([2, 2, 0, 2, 1, 3]):
        sharp[0, t, i] = 0.0
    one = torch.tensor([6])
    assert BeamDecoder()(sharp, one, SYMBOLS) == greedy(sharp, one, SYMBOLS) == ["aa b"]


def test_bad_options_and_files(tmp_path):
    with pytest.raises(ConfigError, match=r"beam=0(?s:.*)least=1"):
        BeamDecoder(beam=0, least=1)
    with pytest.raises(MissingFileError, match="lm="):
        BeamDecoder(lm=tmp_path / "absent.arpa")
    with pytest.raises(MissingFileError, match="lexicon="):
        BeamDecoder(lexicon=str(tmp_path / "absent.txt"))
    (tmp_path / "x.arpa").write_text("hello")
    with pytest.raises(UserError, match="is no ARPA file"):
        BeamDecoder(lm=tmp_path / "x.arpa")
    (tmp_path / "words.txt").write_text("ab\ta b\nb b\n")
    assert BeamDecoder(lexicon=tmp_path / "words.txt").trie == {"a": {"b": {"": {}}}, "b": {"": {}}}
