"""Trains on a stream by DDP with workers, and writes which pictures each step saw, a file a rank.

Arguments: number of processes; pattern; folder; steps; a checkpoint to go on from.
"""

import json
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning.data.stream import StreamDataModule
from tests.data.shards import number_of

SAVED = (4, 13)


class Seeing(L.LightningModule):
    """A linear model that keeps the numbers of the pictures it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.layer(images.mean((2, 3))), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(StreamDataModule):
    """Writes down pictures before they are normalized."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.trainer.lightning_module.seen.append([number_of(image) for image in batch[0]])
        return super().on_after_batch_transfer(batch, dataloader_idx)


class Saving(L.Callback):
    """A checkpoint after each of SAVED steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in SAVED:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt")


def train(processes: int, pattern: str, folder: Path, steps: int, go_on: str = "") -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0)
    data = Seen(
        pattern,
        val_share=0.1,
        index=str(folder.parent / "index"),
        window=2,
        batch_size=3,
        num_workers=2,
        image_size=8,
        augment={"crop_scale": None, "hflip": 0.0},
    )
    run = L.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, max_steps=steps, max_epochs=-1, default_root_dir=folder,
        callbacks=[ll.ExactResume(), Saving()],
    )  # fmt: skip
    model = Seeing()
    run.fit(model, data, ckpt_path=go_on or None)
    (folder / f"seen{run.global_rank}.json").write_text(json.dumps(model.seen))


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
