"""In which order the samples of shards are taken, without anyone holding the whole order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lora_lightning.trainer.loader import SharedSampler


class WindowShuffle(SharedSampler):
    """Shards in another order each time, and within each `window` of them every sample in another order.

    A process takes a run of that order, so that it reads few shards at a time and each shard is read by as
    few processes as possible. Every process gets as many samples: the last ones take some from the front,
    as with `DistributedSampler`. What is held is one window's indices.

    Args:
        counts: samples of each shard, which follow each other in the numbering of the samples.
        window: shards whose samples are mixed.
    """

    def __init__(self, counts: Sequence[int], window: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.starts = np.concatenate(([0], np.cumsum(self.counts)))[:-1]
        self.window = window

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __iter__(self) -> Iterator[int]:
        return self.share(0, 1, 0)

    def share(self, rank: int, count: int, skip: int) -> Iterator[int]:
        """As the base class says."""
        seed = int(torch.randint(2**62, ()))
        each = -(-len(self) // count)
        return self._run(seed, rank * each + skip, each - skip)

    def _run(self, seed: int, place: int, length: int) -> Iterator[int]:
        """So many samples from a place of the order on; behind the last sample follows the first."""
        shards = np.random.default_rng(seed).permutation(len(self.counts))
        windows = [shards[i : i + self.window] for i in range(0, len(shards), self.window)]
        ends = np.cumsum([self.counts[w].sum() for w in windows])
        while length > 0:
            place %= len(self)
            number = int(np.searchsorted(ends, place, side="right"))
            samples = self._mixed(windows[number], seed, number)
            first = place - int(ends[number]) + len(samples)
            taken = samples[first : first + length]
            yield from taken.tolist()
            place, length = place + len(taken), length - len(taken)

    def _mixed(self, shards: np.ndarray, seed: int, number: int) -> np.ndarray:
        runs = [np.arange(self.starts[s], self.starts[s] + self.counts[s]) for s in shards]
        return np.random.default_rng((seed, number)).permutation(np.concatenate(runs))
