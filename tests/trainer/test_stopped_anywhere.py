"""Wherever a checkpoint is written, the run resumed from it does what the unstopped one does from there on:
the same batches, validations, learning rates and ends of epochs, and the same weights to the last bit."""

import random
import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from small import trainer
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset

import lora_lightning as ll


class Noisy(Dataset):
    def __len__(self) -> int:
        return 22  # 6 batches of 4, the last one smaller

    def __getitem__(self, index: int):
        return torch.full((6,), index / 22) + 0.1 * torch.randn(6) + random.random(), index % 3


def draw() -> float:
    return torch.rand(1).item() + random.random() + np.random.rand()


def mixing(samples):
    """A collate function that draws, as those of MixUp do."""
    x, y = torch.utils.data.default_collate(samples)
    return x + torch.randn(1) + draw(), y


class Module(pl.LightningModule):
    """Draws random numbers in every hook that a resumed run calls again, and writes down what happens."""

    def __init__(self, schedule: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.schedule, self.seen = schedule, []
        self.model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.GELU(), nn.Linear(8, 3)
        )

    def see(self, *what) -> None:
        if not self.trainer.sanity_checking:
            loops = self.trainer.fit_loop
            self.seen.append((*what, self.trainer.global_step, loops.epoch_loop._batches_that_stepped))

    def on_train_start(self) -> None:
        draw()

    def on_train_epoch_start(self) -> None:
        self.see("epoch starts", self.current_epoch, draw())

    def on_train_epoch_end(self) -> None:
        self.see("epoch ends", self.current_epoch, draw())

    def on_before_batch_transfer(self, batch, index):
        return batch[0] + draw(), batch[1]

    def on_after_batch_transfer(self, batch, index):
        return batch[0] + 0.1 * torch.randn(1) + draw(), batch[1]

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.see("step", index, loss.item(), self.optimizers().param_groups[0]["lr"])
        return loss

    def on_validation_start(self) -> None:
        self.see("validation", self.current_epoch)

    def validation_step(self, batch, index):
        self.log("val", F.cross_entropy(self.model(batch[0]), batch[1]) + 0 * draw())

    def configure_optimizers(self):
        optimizer = optim.AdamW(self.parameters(), lr=0.02)
        if not self.schedule:
            return optimizer
        if self.schedule == "plateau":
            of = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        else:
            of = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        how = "epoch" if self.schedule == "plateau" else self.schedule
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": of, "interval": how, "monitor": "val"}}


class SaveEverywhere(Checkpoint):
    """After each batch, validation and epoch, behind all other callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, {}  # how much had been seen by then

    def save(self, run: pl.Trainer, where: str) -> None:
        if run.sanity_checking:
            return
        file = self.folder / f"{len(self.files):02}-{where}-{run.current_epoch}-{run.global_step}.ckpt"
        run.save_checkpoint(file)
        self.files[file] = len(run.lightning_module.seen)

    def on_train_batch_end(self, run, *_) -> None:
        self.save(run, "batch")

    def on_validation_end(self, run, _) -> None:
        self.save(run, "validation")

    def on_train_epoch_end(self, run, _) -> None:
        self.save(run, "epoch")


def swa():
    return StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=2)


RUNS = {  # options of the Trainer; "schedule", "callback" and "loader" are taken out
    "an epoch": {},
    "validation within an epoch": {"val_check_interval": 2},
    "accumulating": {"accumulate_grad_batches": 4, "val_check_interval": 3},
    "no validation": {"limit_val_batches": 0},
    "validation every other epoch": {"check_val_every_n_epoch": 2},
    "part of the batches": {"limit_train_batches": 4, "val_check_interval": 0.5},
    "steps": {"max_epochs": -1, "max_steps": 13},
    "steps that end with an epoch": {"max_epochs": -1, "max_steps": 12},
    "steps that end with a validation": {
        "max_epochs": -1, "max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None,
    },
    "schedule by step": {"schedule": "step", "accumulate_grad_batches": 4},
    "schedule by epoch": {"schedule": "epoch"},
    "schedule by metric": {"schedule": "plateau"},
    "stopping early": {"max_epochs": 6, "callback": lambda: EarlyStopping("val", min_delta=0.05, patience=1)},
    "EMA": {"callback": lambda: EMAWeightAveraging(decay=0.8)},
    "SWA": {"callback": swa},
    "SWA, accumulating": {"callback": swa, "accumulate_grad_batches": 4},
    "SWA and a schedule": {"callback": swa, "schedule": "epoch", "max_epochs": 4},
    "workers": {"loader": {"num_workers": 2}, "val_check_interval": 2},
    "collating": {"loader": {"collate_fn": mixing}},
    "collating in workers": {"loader": {"num_workers": 2, "collate_fn": mixing}},
}  # fmt: skip
QUICK = ("validation within an epoch", "schedule by metric", "SWA", "steps that end with a validation")


def fit(folder, options, path=None):
    options = {"max_epochs": 3, **options}
    module = Module(options.pop("schedule", ""))
    loader, callback = options.pop("loader", {}), options.pop("callback", pl.Callback)()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    [draw() for _ in range(3 * (path is not None))]  # as in another process
    best = ModelCheckpoint(folder / "best", "{epoch}", monitor="val", save_top_k=2)
    save = SaveEverywhere(folder)
    adapting = ll.LoRACallback(rank=2, dropout=0.1, train_norm="stats", verbose=False)
    data = ll.ResumableLoader(Noisy(), 4, shuffle=True, seed=2, **loader)
    run = trainer(
        folder, ll.ExactResume(), adapting, callback, best, save, **options
    )  # one too many does no harm
    run.fit(module, data, DataLoader(Noisy(), 4), ckpt_path=path, weights_only=True)
    stopping = callback.state_dict() if isinstance(callback, EarlyStopping) else {}
    end = {
        "epoch": run.current_epoch,
        "step": run.global_step,
        "best": best.best_model_score,
        "stopping": stopping,
        "weights": [w.tolist() for w in module.model.state_dict().values()],
    }
    return module.seen, end, save.files


SOME = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]


@pytest.mark.parametrize("name", SOME)
def test_a_run_resumed_from_anywhere_goes_on_as_the_unstopped_one(name, tmp_path):
    options = RUNS[name]
    seen, end, files = fit(tmp_path / "run", options)
    assert len(files) > 10
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    every = list(files)
    ends = [i for i, f in enumerate(every) if "batch" not in f.name]  # and the batch before each
    chosen = [ends[0] - 1, ends[-2], len(every) - 1, random.Random(name).randrange(len(every))]
    for file in [every[i] for i in chosen] if name in QUICK else every:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        again, other, _ = fit(tmp_path / "run", options, file)
        assert again == seen[files[file] :], file.name
        assert other == end, file.name
