"""ImageClassifier: cross entropy and accuracy for any model that maps images to logits."""

from __future__ import annotations

from typing import Annotated

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchmetrics.classification import MulticlassAccuracy

from lora_lightning.tasks.optim import configured, head_parameters
from lora_lightning.tasks.optim_config import OptimConfig, OptimOptions
from lora_lightning.tasks.scores import Score
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import at_least, is_whole


class ImageClassifier(L.LightningModule):
    """Trains `model` on batches of images (batch, channels, height, width) and labels.

    Labels are class indices (batch,) or, from mixup and cutmix, probabilities (batch, classes).
    Logs train/loss, val/loss, val/acc, test/loss and test/acc, accuracies in [0, 1].

    Args:
        model: images -> logits (batch, num_classes).
        num_classes: how many classes there are.
        optim: the optimizer's options, also as a plain mapping; None takes the defaults.
        label_smoothing: the share of each training label spread over all classes, in [0, 1).

    Raises:
        ConfigError: one line for each bad option.
    """

    scores = (Score("acc", "accuracy %"),)
    monitors = ("acc", "loss")

    def __init__(
        self,
        model: nn.Module,
        num_classes: Annotated[int, at_least(2)],
        optim: OptimOptions = None,
        label_smoothing: Annotated[float, at_least(0, below=1)] = 0.0,
    ) -> None:
        super().__init__()
        given = f"num_classes={num_classes}"
        logits = getattr(model, "num_classes", num_classes)
        other = f"{given}: the model gives {logits} logits; build it with {given}."
        require(ImageClassifier, locals(), [other] if is_whole(num_classes) and logits != num_classes else ())
        self.model = model
        self.optim = OptimConfig.of(optim)
        self.label_smoothing = label_smoothing
        # Plain types, so that the checkpoint loads with weights_only=True.
        self.save_hyperparameters(
            {
                "num_classes": num_classes,
                "optim": self.optim.to_dict(),
                "label_smoothing": label_smoothing,
            }
        )
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def configure_model(self) -> None:
        """Under Lightning's ModelParallelStrategy, shard the model, which is adapted by now, over all
        processes (FSDP2): each block, and the rest. What is frozen may stand beside what trains."""
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for part in reversed(list(self.model.modules())):  # inner blocks before outer ones
            if isinstance(part, (nn.Sequential, nn.ModuleList)):
                for block in part:
                    if any(block.children()):
                        fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes)."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", self.test_acc, batch)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels if labels.ndim == 1 else labels.argmax(1))
        size = len(images)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=size, sync_dist=True)
        self.log(f"{stage}/acc", accuracy, batch_size=size, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configured(self, head_parameters(self.model), self.optim)
