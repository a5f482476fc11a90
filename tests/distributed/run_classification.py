"""Evaluate frozen outputs with a number of processes: run_classification.py PROCESSES FILE."""

import json
import sys
from pathlib import Path

import torch
from lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning.tasks.classification import ImageClassifier

PICTURES = 23  # odd, so that one is seen by both of two processes


class Answers(nn.Module):
    """Gives the values of a picture as its logits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, images):
        return images.flatten(1)


class Frozen(LightningDataModule):
    def val_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        logits = 2 * torch.randn(PICTURES, 7, 1, 1, generator=generator)
        return DataLoader(TensorDataset(logits, torch.randint(7, (PICTURES,), generator=generator)), 3)

    test_dataloader = val_dataloader


def evaluate(processes: int) -> dict:
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    task = ImageClassifier(Answers(), 7)
    trainer.validate(task, Frozen(), verbose=False)
    (scores,) = trainer.test(task, Frozen(), verbose=False)
    del scores["test/loss"]  # which counts twice what two processes see
    found = {**scores, "temperature": task.temperature, "intervals": task.intervals()}
    return {**found, "truths": task.predictions.truths.tolist()} if trainer.is_global_zero else {}


if __name__ == "__main__":
    if found := evaluate(int(sys.argv[1])):
        Path(sys.argv[2]).write_text(json.dumps(found))
