"""Trains a small module on the CPU by DDP and saves its weights, a file a rank; also in run_together.py.

Arguments: number of processes; samples; samples a batch in each process; batches a step; folder; a
checkpoint to go on from. LORA in the environment has more of LoRA's options; SCALED stands for ScaledAdamW.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from small import Classifier, loader, trainer
from torch.utils.data import DataLoader

import lora_lightning as ll


class Counting(DDPStrategy):
    """Counts the backwards that exchange gradients."""

    synced = total = 0

    def backward(self, *arguments, **options):
        Counting.total += 1
        Counting.synced += self.model.require_backward_grad_sync
        return super().backward(*arguments, **options)


class Scaled(Classifier):
    def configure_optimizers(self):
        return ll.ScaledAdamW(ll.param_groups(self, lr=self.lr), self, damping=1e-2)


def train(processes: int, samples: int, batch: int, accumulate: int, folder: Path, go_on: str = "") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = (Scaled if os.environ.get("SCALED") else Classifier)(lr=0.01)
    strategy = {"strategy": Counting(find_unused_parameters=False)} if processes > 1 else {}
    callback = ll.LoRACallback(rank=2, **json.loads(os.environ.get("LORA", "{}")))
    run = trainer(
        folder, callback, max_epochs=int(os.environ.get("EPOCHS", 8)), devices=processes,
        accumulate_grad_batches=accumulate, **strategy,
    )  # fmt: skip
    data = DataLoader(loader(size=samples).dataset, batch)
    run.fit(module, data, ckpt_path=go_on or None, weights_only=True)
    run.save_checkpoint(folder / "x.ckpt")
    ll.save_adapter(module, folder / f"adapter{run.global_rank}")
    torch.save(dict(module.state_dict()), folder / f"rank{run.global_rank}.pt")
    (folder / f"synced{run.global_rank}.txt").write_text(f"{Counting.synced} {Counting.total}")


if __name__ == "__main__":
    train(*map(int, sys.argv[1:5]), Path(sys.argv[5]), *sys.argv[6:])
