"""Trains a small module on the CPU and saves its weights, one file a rank: run by test_distributed.py.

Arguments: number of processes, folder.
"""

import sys
from pathlib import Path

import torch
from small import Classifier, loader, trainer

import lora_lightning as ll

if __name__ == "__main__":
    processes, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Classifier(lr=0.01)
    strategy = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    run = trainer(folder, ll.LoRACallback(rank=2), max_epochs=8, **strategy)
    # One global batch is the whole data, so that the sampler's order cannot matter.
    run.fit(module, loader(size=4, batch_size=4 // processes))
    run.save_checkpoint(folder / "x.ckpt")
    torch.save(dict(module.state_dict()), folder / f"rank{run.global_rank}.pt")
