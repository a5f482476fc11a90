"""Trains a module with an unused layer in two processes, with and without DDP's search for unused
parameters, and saves what each of them raised: run by test_ddp.py.

Argument: folder.
"""

import sys
from pathlib import Path

import torch
from small import Classifier, loader, mlp, trainer

import lora_lightning as ll

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    errors = []
    for strategy in ("ddp_find_unused_parameters_true", "ddp"):
        module = Classifier(mlp())
        module.spare = torch.nn.Linear(4, 4)
        callback = ll.LoRACallback(rank=2, target_modules="all", modules_to_save=None, verify_strict=True)
        run = trainer(folder, callback, max_epochs=3, strategy=strategy, devices=2)
        try:
            run.fit(module, loader(mlp))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    (folder / f"rank{run.global_rank}.txt").write_text("\n---\n".join(errors))
