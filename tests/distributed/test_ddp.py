"""Several processes train what one does: other numbers of them, accumulation, uneven shares."""

from pathlib import Path

import pytest
import run_ddp
import torch
from processes import close, run, same


def train(folder: Path, processes: int, samples: int, batch: int, accumulate: int = 1, *more) -> list[dict]:
    folder.mkdir()
    if processes == 1:
        run_ddp.train(1, samples, batch, accumulate, folder, *more)
    else:
        run("run_ddp.py", processes, samples, batch, accumulate, folder, *more)
    return [torch.load(folder / f"rank{i}.pt") for i in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(first, second, tmp_path, monkeypatch):
    """Four epochs here and four there end as eight of one process."""
    (wanted,) = train(tmp_path / "straight", 1, samples=4, batch=4)
    monkeypatch.setenv("EPOCHS", "4")
    train(tmp_path / "first", first, 4, 4 // first)
    monkeypatch.setenv("EPOCHS", "8")
    ranks = train(tmp_path / "second", second, 4, 4 // second, 1, tmp_path / "first" / "x.ckpt")
    assert same(ranks)
    close(ranks[0], wanted)


@pytest.mark.slow
def test_three_processes_with_accumulation_exchange_once_a_step(tmp_path):
    (single,) = train(tmp_path / "one", 1, samples=12, batch=12)
    ranks = train(tmp_path / "three", 3, samples=12, batch=2, accumulate=2)
    assert same(ranks)
    close(ranks[0], single)
    for rank in range(3):
        synced, total = map(int, (tmp_path / "three" / f"synced{rank}.txt").read_text().split())
        assert (synced, total) == (8, 16)


@pytest.mark.slow
def test_preconditioned_gradients_are_alike_in_every_process(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALED", "1")
    (single,) = train(tmp_path / "one", 1, samples=8, batch=8)
    ranks = train(tmp_path / "two", 2, samples=8, batch=2, accumulate=2)
    assert same(ranks)
    close(ranks[0], single)


@pytest.mark.slow
def test_uneven_shares_and_last_batches(tmp_path):
    """11 samples for two processes in batches of 4: the sampler pads, the last batches have 2."""
    ranks = train(tmp_path / "two", 2, samples=11, batch=4)
    assert same(ranks)


@pytest.mark.slow
def test_layers_in_full_beside_the_updates(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA", '{"modules_to_save": ["auto", "model.3"]}')
    (single,) = train(tmp_path / "one", 1, samples=8, batch=8)
    ranks = train(tmp_path / "two", 2, samples=8, batch=4)
    assert same(ranks)
    for name in ("model.3.weight", "model.9.weight"):
        assert (ranks[0][name] - single[name]).abs().max() <= 1e-3, name


@pytest.mark.slow
def test_restarts_are_the_same_in_every_process(tmp_path, monkeypatch):
    """Each process has random numbers of its own by then."""
    monkeypatch.setenv("LORA", '{"restarts": 2}')
    (single,) = train(tmp_path / "one", 1, samples=4, batch=4)
    ranks = train(tmp_path / "two", 2, samples=4, batch=2)
    assert same(ranks)
    close(ranks[0], single)
    assert all(t.any() for n, t in single.items() if "lora_fixed_A" in n)
