"""Fit a plain module with LoRACallback in several processes, each with a logger of its own folder:
run_logged.py PROCESSES FOLDER."""

import json
import sys
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lora_lightning as ll


class Mine(LightningModule):
    """Knows nothing of LoRA."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(processes: int, folder: Path) -> None:
    callback = ll.LoRACallback(rank=2, target_modules="all", spectra="layers", verbose=False)
    loggers = [CSVLogger(folder, "csv", ""), WandbLogger(save_dir=folder, mode="offline")]
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=2,
        logger=loggers, callbacks=[callback], log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(16, 6), torch.randint(3, (16,))), 4)
    module = Mine()
    trainer.fit(module, data)
    if trainer.is_global_zero:
        found = {name: one.effective_rank for name, one in ll.spectra(module).items()}
        (folder / "spectra.json").write_text(json.dumps(found))


if __name__ == "__main__":
    fit(int(sys.argv[1]), Path(sys.argv[2]))
