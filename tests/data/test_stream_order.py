"""WindowShuffle: every sample once, over processes; few shards at a time; resumable anywhere."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import lora_lightning as ll
from lora_lightning.data.stream_order import WindowShuffle
from lora_lightning.trainer import loader as loaders

COUNTS = [7, 1, 12, 5, 9, 3, 8]  # 45 samples


def order(counts=COUNTS, window=2, rank=0, count=1, skip=0, seed=0) -> list[int]:
    torch.manual_seed(seed)
    return list(WindowShuffle(counts, window).share(rank, count, skip))


def shard_of(samples: list[int]) -> list[int]:
    return np.searchsorted(np.cumsum(COUNTS), samples, side="right").tolist()


@pytest.mark.parametrize("window", [1, 2, 100])
def test_every_sample_once(window):
    assert sorted(order(window=window)) == list(range(45))


@pytest.mark.parametrize("count", [2, 3, 4, 50])
def test_processes_get_as_many_and_together_everything(count):
    shares = [order(rank=rank, count=count) for rank in range(count)]
    each = -(-45 // count)
    assert [len(share) for share in shares] == [each] * count
    flat = [sample for share in shares for sample in share]
    assert flat[:45] == order()
    assert flat[45:] == (order() * count)[: each * count - 45]


def test_a_window_is_left_for_good():
    shards = shard_of(order(window=2))
    half_read = [len({s for s in shards[:i] if s in shards[i:]}) for i in range(45)]
    assert max(half_read) == 2


def test_samples_are_mixed_within_a_window_and_shards_beyond():
    one, other = order(seed=0), order(seed=1)
    assert one != other
    assert list(dict.fromkeys(shard_of(one))) != list(dict.fromkeys(shard_of(other)))
    assert any(a != b + 1 for b, a in pairwise(order(counts=[45])))


def test_skipping_is_going_on():
    for skip in (0, 1, 8, 23):
        assert order(rank=1, count=2, skip=skip) == order(rank=1, count=2)[skip:]


def test_the_order_of_a_huge_set_is_never_held():
    sampler = WindowShuffle([1000] * 100_000, 4)  # 10^8 samples
    torch.manual_seed(0)
    share = sampler.share(3, 8, 12_000_000)
    assert 0 <= next(share) < 10**8
    assert len(sampler) == 10**8


def keys(monkeypatch, rank: int, count: int, start: int = 0, epoch: int = 0) -> list[int]:
    monkeypatch.setattr(loaders, "processes", lambda: (rank, count))
    data = TensorDataset(torch.arange(45))
    loader = ll.ResumableLoader(data, 4, sampler=WindowShuffle(COUNTS, 2), seed=3)
    loader.sampler.set_epoch(epoch)
    loader.start_at(start)
    return [int(x) for (batch,) in loader for x in batch]


def test_the_loader_shards_and_resumes_it(monkeypatch):
    whole = keys(monkeypatch, 1, 2)
    assert keys(monkeypatch, 1, 2, start=3) == whole[12:]
    assert {*keys(monkeypatch, 0, 2), *whole} == set(range(45))
    assert keys(monkeypatch, 1, 2, epoch=1) != whole
