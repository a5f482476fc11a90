"""Evaluate frozen predictions with a number of processes: run_detection.py PROCESSES FILE."""

import json
import sys
from pathlib import Path

import torch
from lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning.data.detection import collate
from lora_lightning.tasks.detection import ObjectDetector
from tests.tasks.frozen_detections import CLASSES, frozen

IMAGES = 23  # odd, so that one image is seen by both of two processes


class Answers(nn.Module):
    """Knows the frozen predictions of an image by the number in its first pixel."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.answers = frozen(IMAGES)[1]

    def forward(self, images):
        found = [dict(self.answers[int(image[0, 0, 0])]) for image in images]
        return [{n: t for n, t in one.items() if n != "masks"} for one in found]


class Frozen(LightningDataModule):
    def val_dataloader(self):
        pairs = [(torch.full((3, 4, 4), float(n)), target) for n, target in enumerate(frozen(IMAGES)[0])]
        return DataLoader(pairs, 3, collate_fn=collate)

    test_dataloader = val_dataloader


def evaluate(processes: int) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    task = ObjectDetector(Answers(), CLASSES)
    scores = (
        trainer.validate(task, Frozen(), verbose=False)[0] | trainer.test(task, Frozen(), verbose=False)[0]
    )
    return scores if trainer.is_global_zero else {}


if __name__ == "__main__":
    if found := evaluate(int(sys.argv[1])):
        Path(sys.argv[2]).write_text(json.dumps(found))
