"""Trains a small module with everything that a resume must restore: run and killed by test_killed_runs.py."""

import multiprocessing
import os
import random
import signal
import stat
import sys
import time
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from torch.utils.data import Dataset

import lora_lightning as ll
from lora_lightning.utils import atomic as files

EPOCHS, SAMPLES, BATCH = 3, 44, 4  # 11 batches an epoch, so that the last step has one batch of two


class Noisy(Dataset):
    """Samples with random numbers of every kind, as augmentation draws them in a worker."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x = torch.full((6,), index / SAMPLES) + torch.randn(6) + np.random.rand() + random.random()
        return x.float(), index % 3


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # the base, rebuilt from its own source
        self.model = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 3)
        )

    def training_step(self, batch, index):
        noise = torch.randn(3) * 0.1 + np.random.rand() + random.random()
        loss = F.cross_entropy(self.model(batch[0]) + noise, batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Count(pl.Callback):
    """Says that a batch begins; at the last one that is asked for, waits to be killed."""

    def __init__(self, batches: Semaphore, last: int) -> None:
        self.batches, self.left = batches, last

    def on_train_batch_start(self, *_) -> None:
        self.batches.release()
        self.left -= 1
        if self.left == 0:
            time.sleep(600)


def die_while_writing(where: str) -> None:
    how, _, nth = where.partition(" ")
    written = []

    def fsync(descriptor: int) -> None:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return  # the folder
        written.append(descriptor)
        if len(written) == int(nth):
            if how == "half":
                path = os.readlink(f"/proc/self/fd/{descriptor}")
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    files.os = type("os", (), {**vars(os), "fsync": staticmethod(fsync)})


def main(folder: Path, workers: int, where: str, batches: Semaphore) -> None:
    """Train, or go on, and write what came out to `end.pt`.

    Args:
        where: to die by its own hand: "half N", with half of the Nth checkpoint written, or "whole N",
            before the Nth checkpoint takes its place; or to wait for it: "batch N", when that begins.
        batches: released with each batch.
    """
    sys.stdout = sys.stderr = open(folder / "log.txt", "a")  # noqa: SIM115
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as it is in a process of its own
    os.environ["WANDB_SILENT"] = "true"
    os.environ.pop("WANDB_SERVICE", None)  # of the tests' own process, which survives this one
    if where.startswith(("half", "whole")):
        die_while_writing(where)
    last = int(where.split()[1]) if where.startswith("batch") else -1
    pl.seed_everything(1, verbose=False)
    module = Module()
    ema = EMAWeightAveraging(decay=0.9)
    saver = ModelCheckpoint(
        folder, save_last=True, every_n_train_steps=2, save_top_k=2, monitor="step", mode="max"
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        val_check_interval=5,
        log_every_n_steps=1,
        callbacks=[
            ema,
            ll.LoRACallback(
                rank=2,
                dropout=0.1,
                train_norm="stats",
                regularizer={"frobenius": 0.1, "orthogonal": 0.1, "heads": 0.1, "outputs": 0.1},
                verbose=False,
            ),
            saver,
            Count(batches, last),
        ],
        logger=WandbLogger(save_dir=folder, id="one", mode="offline"),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = ll.ResumableLoader(
        Noisy(), BATCH, shuffle=True, seed=3, num_workers=workers, persistent_workers=workers > 0
    )
    val = torch.utils.data.DataLoader(Noisy(), BATCH)
    trainer.fit(module, data, val, ckpt_path="last", weights_only=True)
    assert trainer.global_step == 6 * EPOCHS
    end = {
        "weights": module.model.state_dict(),  # EMA has put its average here
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "current": ema._average_model.state_dict(),
        "random": [torch.rand(3), torch.tensor(np.random.rand(3)), torch.tensor(random.random())],
    }
    torch.save(end, folder / "end.pt")
