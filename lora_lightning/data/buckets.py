"""Batches of utterances of like length under a budget in seconds, padding counted."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from torch.utils.data import Dataset

from lora_lightning.data.speech import SAMPLE_RATE, SpeechBatch, Utterance, collate


def bucketed(seconds: Sequence[float], budget: float, seed: int | None = None) -> list[list[int]]:
    """Batches that cost at most `budget` seconds each: the longest of a batch times its size.

    An utterance longer than the budget is a batch of its own. With a seed, which of several equally long
    ones stand together is drawn; the batches are the same in every epoch, and so is their number, which a
    resumed run and the schedule of the learning rate rely on (fairseq does the same).

    Args:
        seconds: of each utterance.
        budget: in seconds.

    Returns:
        Indices of each batch, the longest batch first: what does not fit into memory fails at once.
    """
    order = list(range(len(seconds)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -seconds[i])
    batches: list[list[int]] = []
    for i in order:
        # The first one is the longest of its batch.
        if batches and seconds[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def grouped(utterances: Iterable[Utterance], budget: float) -> Iterator[list[Utterance]]:
    """Utterances in their order, as many together as stay within `budget` seconds, padding counted."""
    group: list[Utterance] = []
    longest = 0
    for utterance in utterances:
        longest = max(longest, len(utterance.wave))
        if group and longest * (len(group) + 1) > budget * SAMPLE_RATE:
            yield group
            group, longest = [], len(utterance.wave)
        group.append(utterance)
    if group:
        yield group


class Batches(Dataset[SpeechBatch]):
    """A dataset whose items are whole batches, so that any loader with `batch_size=None` gives them, and
    `ResumableLoader` resumes them exactly.

    Args:
        batches: indices of each.
        utterances: what the indices stand for.
    """

    def __init__(self, batches: Sequence[Sequence[int]], utterances: Sequence[Utterance]) -> None:
        self.batches, self.utterances = batches, utterances

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> SpeechBatch:
        return collate([self.utterances[i] for i in self.batches[index]])
