"""Word and character errors of single utterances, their intervals by the bootstrap, and confusions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

RESAMPLES = 1000
COVERED = 0.95


class Transcript(NamedTuple):
    """What was said and what a recognizer heard in one utterance."""

    id: str
    accent: str
    speaker: str
    reference: str
    hypothesis: str


class Interval(NamedTuple):
    """An error rate as a fraction, and the interval that covers it with a probability of 95 %."""

    rate: float
    low: float
    high: float


def units(text: str, unit: str) -> list[str]:
    """The words of a text, or its characters with the spaces between the words."""
    return text.split() if unit == "word" else list(" ".join(text.split()))


def count_errors(transcripts: Sequence[Transcript], unit: str = "word") -> tuple[np.ndarray, np.ndarray]:
    """Substitutions, deletions and insertions (n,), and units of the reference (n,), utterance by
    utterance; the error rate is the ratio of their sums.

    Args:
        unit: "word" or "character".
    """
    pairs = [(units(t.reference, unit), units(t.hypothesis, unit)) for t in transcripts]
    errors = np.array([Levenshtein.distance(r, h) for r, h in pairs], dtype=np.int64)
    return errors, np.array([len(r) for r, _ in pairs], dtype=np.int64)


def bootstrap(errors: np.ndarray, lengths: np.ndarray, groups: Sequence[str] | None = None) -> Interval:
    """The error rate with its percentile interval (Bisani and Ney 2004, "Bootstrap estimates for
    confidence intervals in ASR performance evaluation").

    Args:
        errors: (n,), of each utterance.
        lengths: (n,), units of each reference.
        groups: the speaker of each utterance, to draw speakers instead of utterances, which are not
            independent within one; None draws utterances.
    """
    if groups is not None:
        names = sorted(set(groups))
        member = np.array([names.index(g) for g in groups])
        errors = np.bincount(member, errors, len(names))
        lengths = np.bincount(member, lengths, len(names))
    draws = np.random.default_rng(0).integers(len(errors), size=(RESAMPLES, len(errors)))
    rates = errors[draws].sum(1) / np.maximum(1, lengths[draws].sum(1))
    tail = (1 - COVERED) / 2
    low, high = np.quantile(rates, (tail, 1 - tail))
    return Interval(float(errors.sum() / max(1, lengths.sum())), float(low), float(high))


def error_rate(transcripts: Sequence[Transcript], unit: str = "word") -> Interval:
    """Word or character error rate of transcripts, with its interval over utterances."""
    return bootstrap(*count_errors(transcripts, unit))


def confusions(transcripts: Sequence[Transcript]) -> Counter[tuple[str, str]]:
    """How often each word was heard as another: (said, heard); "" for what was left out or put in."""
    counts: Counter[tuple[str, str]] = Counter()
    for transcript in transcripts:
        said, heard = transcript.reference.split(), transcript.hypothesis.split()
        for edit in Levenshtein.editops(said, heard):
            left = said[edit.src_pos] if edit.tag != "insert" else ""
            right = heard[edit.dest_pos] if edit.tag != "delete" else ""
            counts[left, right] += 1
    return counts
