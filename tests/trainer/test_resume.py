"""Resumed from any checkpoint of a run, by step, by epoch or by validation, the run ends the same; and what
this rests on: the loader, the random numbers."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Classifier, cnn, save_checkpoint, trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import lora_lightning as ll
from lora_lightning.utils.rng import random_state, seeded, set_random_state


class Noisy(Dataset):
    def __init__(self, size: int = 22) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        x = torch.full((3, 10, 10), index / self.size) + torch.randn(3, 10, 10)
        return x + np.random.rand() + random.random(), index % 3


class Owner(Classifier):
    def __init__(self) -> None:
        torch.manual_seed(11)
        super().__init__(cnn(), 0.01)

    def training_step(self, batch, index):
        return super().training_step(batch, index) * (1 + random.random() + np.random.rand())


SAVERS = {
    "steps": {"every_n_train_steps": 1},
    "epochs": {"save_on_train_epoch_end": True},
    "validation": {"save_on_train_epoch_end": False},
}
RUNS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 13, "max_epochs": -1},
    "accumulating": {"max_epochs": 2, "accumulate_grad_batches": 4},
    "limited": {"max_epochs": 3, "limit_train_batches": 4},
}


def adapting():
    return ll.LoRACallback(rank=2, dropout=0.2, train_norm="stats")


def fit(folder, saver, options, workers=0, path=None, callback=adapting):
    module = Owner()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    data = ll.ResumableLoader(Noisy(), 4, shuffle=True, seed=2, num_workers=workers)
    save = ModelCheckpoint(folder, "{step}", save_top_k=-1, **SAVERS[saver])
    run = trainer(folder, callback(), save, val_check_interval=2, **RUNS[options])
    run.fit(module, data, DataLoader(Noisy(), 4), ckpt_path=path, weights_only=True)
    return list(module.state_dict().values()), sorted(folder.glob("*.ckpt"))


QUICK = {  # each run is stopped in the midst of an epoch and at an end
    ("steps", "epochs"), ("steps", "limited"), ("steps", "accumulating"), ("epochs", "steps"),
    ("epochs", "limited"), ("validation", "steps"), ("validation", "accumulating"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("saver", "options"),
    [
        pytest.param(saver, options, marks=[] if (saver, options) in QUICK else pytest.mark.slow)
        for saver in SAVERS
        for options in RUNS
    ],
)
def test_resumed_from_each_checkpoint_the_run_ends_the_same(saver, options, tmp_path):
    wanted, files = fit(tmp_path / "straight", saver, options)
    assert len(files) >= 2
    chosen = files if len(files) < 4 else random.Random(0).sample(files, 3)
    for file in chosen:
        found, _ = fit(tmp_path / file.stem, saver, options, path=file)
        differ = sum(not torch.equal(a, b) for a, b in zip(wanted, found))
        assert not differ, f"{differ} of {len(wanted)} tensors, resumed from {file.name}"


def test_gradients_accumulated_since_the_last_step_are_taken_up(tmp_path):
    class SavesWithin(ll.LoRACallback):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if args[-1] == 1 and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    wanted, _ = fit(tmp_path / "straight", "epochs", "accumulating", callback=lambda: SavesWithin(rank=2))
    found, _ = fit(
        tmp_path / "resumed",
        "epochs",
        "accumulating",
        path=tmp_path / "within.ckpt",
        callback=lambda: ll.LoRACallback(rank=2),
    )
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))


def test_without_lora_too(tmp_path):
    wanted, files = fit(tmp_path / "straight", "steps", "epochs", callback=ll.ExactResume)
    found, _ = fit(tmp_path / "resumed", "steps", "epochs", path=files[3], callback=ll.ExactResume)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    plain, _ = fit(tmp_path / "plain", "steps", "epochs", path=files[3], callback=pl.Callback)
    assert not all(torch.equal(a, b) for a, b in zip(wanted, plain, strict=True))


def test_the_number_of_workers_does_not_matter(tmp_path):
    wanted, files = fit(tmp_path / "none", "epochs", "epochs")
    found, _ = fit(tmp_path / "two", "epochs", "epochs", workers=2, path=files[0])
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))


def batches(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [x for (x,) in loader]


def test_batches_are_a_function_of_seed_and_epoch():
    data = TensorDataset(torch.arange(10.0))
    one, other = (ll.ResumableLoader(data, 4, shuffle=True, seed=s) for s in (1, 2))
    first = torch.cat(batches(one, 0))
    assert sorted(first.tolist()) == list(range(10))
    assert torch.equal(first, torch.cat(batches(one, 0)))
    assert not torch.equal(first, torch.cat(batches(one, 1)))
    assert not torch.equal(first, torch.cat(batches(other, 0)))
    plain = ll.ResumableLoader(data, 4)
    assert torch.cat(batches(plain, 3)).tolist() == list(range(10))


def test_a_pass_begins_where_it_is_told_and_the_next_at_the_beginning():
    loader = ll.ResumableLoader(TensorDataset(torch.arange(10.0)), 2, shuffle=True, seed=4)
    whole = batches(loader, 0)
    loader.start_at(3)
    assert torch.equal(torch.cat(batches(loader, 0)), torch.cat(whole[3:]))
    assert torch.equal(torch.cat(batches(loader, 0)), torch.cat(whole))
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert torch.equal(torch.cat([x for (x,) in loader]), torch.cat(whole[2:]))


def test_loading_takes_no_random_numbers_from_the_training():
    loader = ll.ResumableLoader(Noisy(), 4, shuffle=True)
    before = torch.get_rng_state(), random.getstate()
    list(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_a_sampler_decides_the_order():
    data = TensorDataset(torch.arange(6.0))
    sampler = WeightedRandomSampler([0, 0, 1, 1, 0, 0], 6)
    loader = ll.ResumableLoader(data, 3, sampler=sampler, seed=1)
    first = torch.cat(batches(loader, 0))
    assert set(first.tolist()) == {2, 3}
    assert torch.equal(first, torch.cat(batches(loader, 0)))


def test_each_process_takes_its_share(monkeypatch):
    loader = ll.ResumableLoader(TensorDataset(torch.arange(7.0)), 2, shuffle=True, seed=1)
    shares = []
    for rank in range(3):
        monkeypatch.setattr("lora_lightning.trainer.loader.processes", lambda rank=rank: (rank, 3))
        assert len(loader) == 2
        shares.append(torch.cat(batches(loader, 0)).tolist())
    assert [len(s) for s in shares] == [3, 3, 3]
    assert {i for share in shares for i in share} == set(range(7))


def test_what_cannot_be_resumed_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    data = TensorDataset(torch.zeros(3))
    with pytest.raises(ll.ConfigError, match="dataset=Stream: give one with indices"):
        ll.ResumableLoader(Stream())
    with pytest.raises(ll.ConfigError, match="batch_sampler: is not resumable"):
        ll.ResumableLoader(data, batch_sampler=[[0, 1]])
    with pytest.raises(ll.ConfigError, match="shuffle=True: the sampler decides"):
        ll.ResumableLoader(data, shuffle=True, sampler=WeightedRandomSampler([1, 1, 1], 3))


def test_random_state_goes_there_and_back():
    def draw():
        return random.random(), np.random.randn(), torch.randn(3).tolist()

    draw(), np.random.randn()  # numpy and torch keep half of a pair of normal numbers
    state = random_state()
    one = draw()
    with seeded(1, 2):
        assert draw() != one
    set_random_state(state)
    assert draw() == one


def test_overfit_batches_takes_the_same_samples_in_each_epoch(tmp_path):
    seen = []

    class Sees(Owner):
        def training_step(self, batch, index):
            seen.append(batch[1].tolist())
            return super().training_step(batch, index)

    data = ll.ResumableLoader(Noisy(), 4, shuffle=True)
    trainer(tmp_path, ll.LoRACallback(rank=2), overfit_batches=2, max_epochs=3).fit(Sees(), data)
    assert seen[:2] == seen[2:4] == seen[4:]


def test_lightning_does_not_warn_of_a_loader_that_cannot_resume(tmp_path, recwarn):
    _, files = fit(tmp_path, "steps", "epochs")
    fit(tmp_path / "more", "steps", "epochs", path=files[1])
    assert not any("not resumable" in str(w.message) for w in recwarn)


def test_another_number_of_processes_goes_on_with_its_own_numbers(tmp_path):
    """A checkpoint of two processes holds the state of both, which one process cannot take up."""
    _, files = fit(tmp_path, "epochs", "epochs")
    checkpoint = torch.load(files[0], weights_only=True)
    checkpoint["lora_lightning_progress"]["processes"] *= 2
    save_checkpoint(checkpoint, tmp_path / "two.ckpt")
    pl.seed_everything(1)
    fit(tmp_path / "more", "epochs", "epochs", path=tmp_path / "two.ckpt")
