"""Ranks and inits by data on two processes whose data differ, through a step that gathers from both.

Arguments: folder.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from small import Classifier, loader, trainer
from torch.utils.data import DataLoader, TensorDataset

import lora_lightning as ll


class Gathering(Classifier):
    """Its step waits for the other process."""

    def training_step(self, batch, index):
        features = self(batch[0])
        self.all_gather(features.detach())
        return F.cross_entropy(features, batch[1])


class Keep(pl.Callback):
    """What the updates begin with, and end with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer, module):
        torch.save(about(module), self.folder / f"begun{trainer.global_rank}.pt")

    def on_train_end(self, trainer, module):
        torch.save(about(module), self.folder / f"ended{trainer.global_rank}.pt")


def about(module):
    plan = module.lora_state.plan
    ranks = torch.tensor([layer.rank for layer in plan.layers])
    return {"ranks": ranks, **{n: p.detach().clone() for n, p in module.named_parameters() if ".lora_" in n}}


def main(folder: Path, processes: int = 2) -> None:
    torch.set_num_threads(1)
    callback = ll.LoRACallback(rank="auto", budget=700, init="eva", data_batches=2, verbose=False)
    strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    run = trainer(folder, Keep(folder), callback, max_epochs=1, devices=processes, strategy=strategy)
    x, y = loader(size=16).dataset.tensors
    if run.global_rank:
        x = x.flip(0) * torch.linspace(0, 3, 10)  # what the second process sees is of another kind
    run.fit(Gathering(lr=0.01), DataLoader(TensorDataset(x, y), 4))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
