"""Trains a module with an unused layer in two processes, with and without DDP's search for unused
parameters, and saves what each of them raised: a part of run_together.py."""

from pathlib import Path

import torch
from small import Classifier, loader, mlp, trainer

import lora_lightning as ll


def train(folder: Path) -> None:
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
