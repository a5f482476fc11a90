"""A small classifier's adapter in a folder that lies alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lightning as ll
from lora_lightning.files.random_base import keep_base
from lora_lightning.models.timm import timm_model

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
NAME = "vit_tiny_patch16_224"
NAMES = ["cat", "dog; or wolf", "köttur"]
SHOWN = {
    "input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear",
    "crop_pct": 0.875, "crop_mode": "center",
}  # fmt: skip


def classifier(folder: Path, data: dict[str, Any] | None = None, **facts: Any) -> tuple[Path, nn.Module]:
    """An adapter's folder that lies alone, and its model, adapted."""
    torch.manual_seed(0)
    count = facts.get("num_classes", 3)
    model = timm_model(NAME, num_classes=count, **VIT)
    keep_base(model, folder)
    ll.inject(model, ll.LoRAConfig(rank=2))
    for parameter in ll.lora_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    nn.init.normal_(model.get_submodule("head").weight, std=0.5)
    config = {
        "model": {"_target_": "lora_lightning.models.timm.timm_model", "name": NAME, **VIT},
        "task": {"_target_": "lora_lightning.tasks.classification.ImageClassifier"},
        "trainer": {"accelerator": "cpu"},
        **({"data": data} if data else {}),
    }
    origin = {"config": config, "facts": {"num_classes": count, **SHOWN, **facts}}
    ll.save_adapter(model, folder, origin=origin)
    return folder, model.eval()
