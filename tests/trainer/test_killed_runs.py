"""A run killed with SIGKILL at any moment and resumed in a new process ends bit for bit as one that was
not killed."""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killed_run import main
from torch.utils._pytree import tree_flatten

processes = multiprocessing.get_context("forkserver")  # new processes, which share nothing but the imports
processes.set_forkserver_preload(["killed_run", "wandb.sdk.launch"])


@pytest.fixture(scope="module", autouse=True)
def _found_by_the_forkserver() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        yield


def run(folder: Path, workers: int, where: str = "") -> int | None:
    """Begin, or go on; to the end, or to be killed: when "batch N" begins, "later N" hundredths of a second
    after the first one began, or while a checkpoint is being written."""
    batches = processes.Semaphore(0)
    process = processes.Process(target=main, args=(folder, workers, where, batches))
    process.start()
    if where.startswith(("batch", "later")):
        number = int(where.split()[1])
        for _ in range(number if where.startswith("batch") else 1):
            while not batches.acquire(timeout=1):
                assert process.is_alive(), (folder / "log.txt").read_text()
        if where.startswith("later"):
            time.sleep(number / 100)
        process.kill()
    process.join(300)
    return process.exitcode


def finish(folder: Path, workers: int) -> dict:
    assert run(folder, workers) == 0, (folder / "log.txt").read_text()
    return torch.load(folder / "end.pt")


def differences(one: dict, other: dict) -> list[int]:
    (ours, spec), (theirs, other_spec) = tree_flatten(one), tree_flatten(other)
    assert spec == other_spec
    return [
        i
        for i, (a, b) in enumerate(zip(ours, theirs))
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
    ]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory) -> dict:
    return finish(tmp_path_factory.mktemp("unstopped"), workers=0)


@pytest.mark.parametrize(
    ("workers", "deaths"),
    [(2, ["batch 7", "half 2"]), (0, ["batch 16", "whole 3"])],
    ids=["with half a checkpoint", "with a checkpoint not yet in place"],
)
def test_killed_and_resumed_equals_unstopped(workers, deaths, unstopped, tmp_path):
    for where in deaths:
        assert run(tmp_path, workers, where) == -9, (tmp_path / "log.txt").read_text()
    assert not differences(finish(tmp_path, workers), unstopped)
    runs = list((tmp_path / "wandb").glob("offline-run-*-one*"))  # begun in one second: -one and -one-1
    assert len(runs) == len(deaths) + 1  # parts of one run: `wandb sync` joins them by their id


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_killed_at_random_moments(trial, unstopped, tmp_path):
    chance = random.Random(trial)
    for _ in range(chance.randint(1, 3)):
        where = f"{chance.choice(('batch', 'half', 'whole', 'later'))} {chance.randint(1, 8)}"
        where += "0" * where.startswith("later")
        code = run(tmp_path, chance.choice((0, 1, 2)), where)
        assert code == -9 or (code == 0 and "batch" not in where), (tmp_path / "log.txt").read_text()
    assert not differences(finish(tmp_path, chance.choice((0, 2))), unstopped)
