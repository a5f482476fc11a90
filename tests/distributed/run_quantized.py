"""Trains a quantized ViT on the CPU by DDP and saves its weights, a file a rank: part of run_together.py."""

from pathlib import Path

import torch
from small import Classifier, loader, pretrained, trainer, vit

import lora_lightning as ll


def train(processes: int, batch: int, folder: Path) -> None:
    torch.manual_seed(0)
    module = Classifier(pretrained(vit), lr=0.01)
    ll.quantize(module, "int8")
    strategy = {"strategy": "ddp"} if processes > 1 else {}
    run = trainer(folder, ll.LoRACallback(rank=2), devices=processes, max_epochs=4, **strategy)
    run.fit(module, loader(vit, size=4, batch_size=batch))
    ll.save_adapter(module, folder / f"adapter{run.global_rank}")
    state = dict(module.state_dict())
    weight = module.model.blocks[0].attn.qkv._parameters["weight"]
    state["codes"] = weight.codes
    torch.save(state, folder / f"rank{run.global_rank}.pt")
