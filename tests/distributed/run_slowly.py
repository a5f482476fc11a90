"""Trains a small module slowly, to be ended or killed meanwhile, and goes on from its last checkpoint: run by
test_preemption.py and test_two_nodes.py.

Prints a line a step. Arguments: processes here, machines, seconds a step, folder.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from small import Classifier, loader, trainer

import lora_lightning as ll
from lora_lightning.app.launch import reported
from lora_lightning.app.preemption import Preemption

EPOCHS, STEPS = 6, 4


class Slow(Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer, module, batch, index):
        print(f"rank {trainer.global_rank} step {trainer.global_step}", flush=True)
        time.sleep(self.seconds)


if __name__ == "__main__":
    here, machines = int(sys.argv[1]), int(sys.argv[2])
    seconds, folder = float(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Classifier(lr=0.01)
    processes = here * machines
    strategy = DDPStrategy(timeout=timedelta(seconds=20)) if processes > 1 else "auto"
    save = ModelCheckpoint(folder, "best", save_last=True, every_n_epochs=1, enable_version_counter=False)
    with reported(folder.parent):
        run = trainer(
            folder, ll.LoRACallback(rank=2, dropout=0.1), save, Preemption(folder), Slow(seconds),
            max_epochs=EPOCHS, strategy=strategy, devices=here, num_nodes=machines,
            accumulate_grad_batches=2,
        )  # fmt: skip
        dataset = loader(size=2 * STEPS * 4).dataset
        data = ll.ResumableLoader(dataset, batch_size=4 // processes, shuffle=True, seed=3)
        run.fit(module, data, loader(size=4), ckpt_path="last", weights_only=True)
    torch.save(dict(module.state_dict()), folder / f"rank{run.global_rank}.pt")
