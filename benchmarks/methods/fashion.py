"""EfficientNet-Lite0 of ImageNet and Fashion-MNIST, few pictures a class, as the application builds them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.real_files import efficientnet_lite0
from benchmarks.real_methods import CLASSES, Batches, sets

LABELS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
EPOCHS = {100: 3, 50: 6, 10: 15, 5: 30}  # by pictures a class: 60, 60, 30 and 30 steps
WORDS = (
    "recipe=cnn_imagefolder", "data/augment=none", "trainer=cpu", "trainer.precision=32-true", "lora.rank=8",
    "trainer.gradient_clip_val=null", "optim.weight_decay=0", "task.calibrate=false", "threads=1",
)  # fmt: skip


class FashionPictures(L.LightningDataModule):
    """So many training pictures a class, half of them mirrored as they come, 500 for validation and 1,000 to
    test on: the same ones for every seed.

    Args:
        shots: training pictures a class.
    """

    def __init__(self, shots: int) -> None:
        super().__init__()
        self.sets = sets(shots)
        self.provides = {"target": "class", "num_classes": CLASSES, "class_names": list(LABELS)}

    def train_dataloader(self) -> Any:
        return Batches(*self.sets["train"], shuffle=True)

    def val_dataloader(self) -> Any:
        return Batches(*self.sets["val"])

    def test_dataloader(self) -> Any:
        return Batches(*self.sets["test"])


def lite0(num_classes: int) -> nn.Module:
    """With its ImageNet weights and a head that begins at zero."""
    model: Any = efficientnet_lite0(num_classes)
    return model.to(memory_format=torch.channels_last)
