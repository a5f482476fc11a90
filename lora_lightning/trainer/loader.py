"""ResumableLoader: a DataLoader whose batches are a function of (seed, epoch), and which can go on from
the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, cast

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lora_lightning.errors import ConfigError
from lora_lightning.utils.rng import seeded

Key = tuple[int, int]  # epoch and index of a sample


class ResumableLoader(DataLoader):
    """A DataLoader for training that a resumed run takes up at the very batch where it stopped.

    The order of the samples is a function of (seed, epoch), and so is everything random that the dataset
    does to them: before each batch Python, numpy and torch are seeded by (seed, epoch, first index), in a
    worker or not. So the batches do not depend on the number of workers, and the batches behind a
    resumed run are skipped without being loaded. In a distributed run each process takes its share, as
    with `DistributedSampler`.

    Lightning saves and restores where it stands. The training itself is resumed exactly with
    `LoRACallback`, whose checkpoints hold the state of the random numbers.

    Args:
        dataset: a dataset with indices and a length.
        batch_size: samples a batch and process.
        shuffle: another order in each epoch.
        sampler: in place of `shuffle`, such as `WeightedRandomSampler`; it must draw from torch's global
            generator (`generator=None`), which is seeded for it.
        seed: of the order and of what the dataset draws.
        **options: any other option of `torch.utils.data.DataLoader`.

    Raises:
        ConfigError: an iterable dataset, or a `batch_sampler`.

    Example::

        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.arange(6.0))
        >>> len(ResumableLoader(data, batch_size=2, shuffle=True, seed=1))
        3
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool = False,
        sampler: Sampler[int] | None = None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        problems = []
        if isinstance(dataset, IterableDataset):
            problems.append(f"dataset={type(dataset).__name__}: give one with indices.")
        if options.get("batch_sampler") is not None:
            problems.append("batch_sampler: is not resumable; give batch_size, and shuffle or a sampler.")
        if shuffle and sampler is not None:
            problems.append("shuffle=True: the sampler decides the order; give one of the two.")
        if problems:
            raise ConfigError(problems)
        self.seed = seed
        if not isinstance(dataset, SeededSamples):
            dataset = SeededSamples(dataset, seed)
        if sampler is None:
            sampler = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
        options = {k: v for k, v in options.items() if k != "batch_sampler"}
        super().__init__(dataset, batch_size, sampler=EpochOrder(sampler, seed), **options)
        if not isinstance(self.collate_fn, SeededCollate):  # Lightning makes a loader again from its parts
            self.collate_fn = SeededCollate(dataset, self.collate_fn)
        self._start = self._taken = 0
        self._waiting = False

    def __iter__(self) -> Any:
        if self._waiting:
            self._start = 0  # it was meant for the pass before, which never began
        self._waiting = True
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        """A generator, because Lightning makes the iterator before it tells the sampler the epoch, and
        workers would begin with the wrong one."""
        order = cast(EpochOrder, self.sampler)
        self._taken, self._start, self._waiting = self._start, 0, False
        order.skip = self._taken * (self.batch_size or 1)
        with seeded(self.seed):  # torch draws a seed for the workers, which is not used
            batches = super().__iter__()
        for batch in batches:
            self._taken += 1
            yield batch

    def start_at(self, batch: int) -> None:
        """Begin the next pass later; the passes after it are whole.

        Args:
            batch: index of its first batch.
        """
        self._start = batch

    def state_dict(self) -> dict[str, int]:
        return {"batch": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start_at(state["batch"] % len(self))


class SeededSamples(Dataset[Any]):
    """A dataset that does the same to a sample each time it is loaded with the same (epoch, index)."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.first: Key = (0, 0)  # of the batch that was loaded last

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, key: Key | int) -> Any:
        """A plain index, which no loader gives, is the dataset's own affair."""
        return self.__getitems__([key])[0] if isinstance(key, tuple) else self.dataset[key]

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        self.first = keys[0]
        indices = [index for _, index in keys]
        with seeded(self.seed, *self.first):
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]


class SeededCollate:
    """A `collate_fn`, such as one that mixes samples, that does the same to a batch loaded again."""

    def __init__(self, samples: SeededSamples, collate: Callable[[Any], Any]) -> None:
        self.samples, self.collate = samples, collate

    def __call__(self, batch: Any) -> Any:
        with seeded(self.samples.seed, *self.samples.first, 1):
            return self.collate(batch)


class EpochOrder(DistributedSampler[Any]):
    """The keys (epoch, index) of one process in one epoch, in the order of another sampler.

    A DistributedSampler, so that Lightning tells it the epoch and does not replace it; it does not call
    its constructor, because the number of processes may not be known before it begins.

    Attributes:
        skip: samples to leave out at the beginning of the next pass.
    """

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.inner, self.seed, self.epoch, self.skip = sampler, seed, 0, 0

    def __len__(self) -> int:
        return -(-len(cast(Sized, self.inner)) // processes()[1])

    def __iter__(self) -> Iterator[Key]:
        skip, self.skip = self.skip, 0
        with seeded(self.seed, self.epoch):
            share = self._share(*processes(), skip)
        yield from ((self.epoch, index) for index in share)

    def _share(self, rank: int, count: int, skip: int) -> Iterable[int]:
        if isinstance(self.inner, SharedSampler):
            return self.inner.share(rank, count, skip)
        order = list(self.inner)
        padding = len(self) * count - len(order)
        order += (order * count)[:padding]  # as DistributedSampler: every process gets as many
        return order[rank::count][skip:]


class SharedSampler(Sampler[int]):
    """A sampler that gives each process its own part of the order, so that nobody holds the whole of it."""

    def share(self, rank: int, count: int, skip: int) -> Iterator[int]:
        """The indices of one of `count` processes but its first `skip`, as many for each process.

        What is random is drawn from torch's global generator, which is seeded alike in all of them, before
        this returns; the iterator may draw no more of it.
        """
        raise NotImplementedError


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
