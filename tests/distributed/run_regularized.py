"""Trains a small module by L + λ·R in two processes, and saves its weights: a part of run_together.py."""

from pathlib import Path

import torch
from small import Classifier, loader, mlp, pretrained, trainer
from torch.utils.data import DataLoader, DistributedSampler, Subset

import lora_lightning as ll


class Halves(Classifier):
    """One half of the data a batch, every other sample, in a process of its own or one after the other."""

    def train_dataloader(self) -> DataLoader:
        data = loader(mlp, 8).dataset
        if self.trainer.world_size > 1:
            return DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))
        return DataLoader(Subset(data, [0, 2, 4, 6, 1, 3, 5, 7]), 4)


def train(processes: int, folder: Path) -> None:
    torch.manual_seed(0)
    module = Halves(pretrained(mlp), lr=0.01)
    terms = {"frobenius": 0.1, "l2": 0.1, "orthogonal": 0.1, "heads": 0.1, "outputs": 0.5}
    callback = ll.LoRACallback(rank=2, verbose=False, regularizer=terms)
    halves = {"strategy": "ddp"} if processes > 1 else {"accumulate_grad_batches": 2}
    run = trainer(folder, callback, max_epochs=6, devices=processes, **halves)
    run.fit(module)
    torch.save(dict(module.state_dict()), folder / f"rank{run.global_rank}.pt")
