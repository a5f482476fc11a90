"""SpeechBatch: utterances of different lengths as one batch, and how they come together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SAMPLE_RATE = 16_000


class Utterance(NamedTuple):
    """One recording and what is said in it; a dataset of speech gives these.

    Attributes:
        wave: (samples,), float32 in [-1, 1], mono at 16 kHz.
        text: as the vocabulary of the recognizer spells it; "" where it is unknown.
        id: unique within its corpus.
        accent: "" where it is unknown.
        speaker: "" where it is unknown.
    """

    wave: Tensor
    text: str = ""
    id: str = ""
    accent: str = ""
    speaker: str = ""


def ids_of(utterances: Sequence[Utterance]) -> list[str]:
    """The ids of a dataset's utterances; one that is a list of rows has them as `ids`, and reads no audio."""
    known: Any = getattr(utterances, "ids", None)
    return [one.id for one in utterances] if known is None else list(known)


class SpeechBatch(NamedTuple):
    """Utterances as recognizers take them.

    Attributes:
        waves: (batch, samples), float32, 16 kHz, zeros behind the end of each.
        lengths: (batch,), int64, samples of each.
        texts: what is said.
        ids: names of the utterances.
        accents: "" where unknown.
        speakers: "" where unknown.
    """

    waves: Tensor
    lengths: Tensor
    texts: list[str]
    ids: list[str]
    accents: list[str]
    speakers: list[str]


def collate(utterances: Sequence[Utterance]) -> SpeechBatch:
    """Pad the waves with zeros to the longest: `collate_fn` of a DataLoader."""
    return SpeechBatch(
        pad_sequence([u.wave for u in utterances], batch_first=True),
        torch.tensor([len(u.wave) for u in utterances]),
        [u.text for u in utterances],
        [u.id for u in utterances],
        [u.accent for u in utterances],
        [u.speaker for u in utterances],
    )
