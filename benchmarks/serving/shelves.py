"""Bases of different sizes, folders of a thousand adapters of each, and what is uploaded to them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import nn

import lora_lightning as ll
from lora_lightning.data.accents import VOCABULARY
from lora_lightning.data.audio import read_audio
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.serving.inputs import Limits
from lora_lightning.serving.kinds import Base, Classes, Facts, Kind
from lora_lightning.utils.progress import working

CORPUS = Path(ll.__file__).parent / "data" / "accents"
RANK = 8
BODIES = 8  # different uploads


@dataclass(frozen=True)
class Shape:
    """A base and its uploads.

    Attributes:
        about: for the table.
        task: "classify" or "transcribe".
        model: makes the base, always the same.
        facts: that come with its adapters.
        body: makes the n-th upload.
        config: by which `lora-lightning predict` builds the base, where it can.
        large: so that fewer ways are measured.
    """

    name: str
    about: str
    task: str
    model: Callable[[], nn.Module]
    facts: Mapping[str, Any]
    body: Callable[[int], bytes]
    config: Mapping[str, Any] | None = None
    large: bool = False

    def base(self, model: nn.Module | None = None) -> Base:
        """To be served, with a model of one's own or a new one."""
        fabric = Fabric(accelerator="cpu", devices=1)
        return Base((model or self.model()).eval(), fabric, self.facts)

    def kind(self, base: Base) -> Kind:
        if self.task == "classify":
            return Classes(base, Limits())
        from lora_lightning.serving.speech import Words

        return Words(base, Limits())

    def adapted(self) -> nn.Module:
        """The base with an adapter of rank 8 in every layer, and its head."""
        torch.manual_seed(0)
        model = self.model().eval()
        ll.inject(model, ll.LoRAConfig(rank=RANK), adapter="a0")
        return model


def _vit(size: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=size)

    return make


VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "checkpoint": "vit_digits", "pretrained": False, "img_size": 16,
    "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3,
}  # fmt: skip
CONFORMER: dict[str, Any] = {"checkpoint": "conformer_us", "width": 128, "depth": 2, "dropout": 0.0}
HERE = {"accelerator": "cpu", "precision": "32-true"}


def _digits() -> nn.Module:
    from lora_lightning.models.timm import timm_model

    return timm_model(num_classes=10, **VIT)


def _conformer() -> nn.Module:
    from lora_lightning.models.ctc import conformer_ctc

    return conformer_ctc(VOCABULARY, **CONFORMER)


def _seen(size: int) -> Facts:
    return {
        "target": "class", "num_classes": 10, "class_names": [f"class {i}" for i in range(10)],
        "input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
        "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip


def _picture(size: int) -> Callable[[int], bytes]:
    def make(n: int) -> bytes:
        pixels = np.random.default_rng(n).integers(0, 256, (size, size, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return make


def _sound(n: int) -> bytes:
    """Two seconds of the embedded corpus, synthetic speech."""
    file = io.BytesIO()
    soundfile.write(
        file, read_audio(CORPUS / "scottish-test.opus", 3.0 * n, 3.0 * n + 2).numpy(), 16_000, format="WAV"
    )
    return file.getvalue()


def _shape_of_vit(size: int) -> Shape:
    about = f"ViT-Tiny/16 at {size} px, 5.5M"
    return Shape(f"vit_{size}", about, "classify", _vit(size), _seen(size), _picture(size), large=size > 100)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("digits", "ViT 96 x 4 at 16 px, 0.5M", "classify", _digits, _seen(16), _picture(16),
              {"model": {"_target_": "lora_lightning.models.timm.timm_model", **VIT},
               "data": {"_target_": "lora_lightning.data.digits.DigitsDataModule"},
               "task": {"_target_": "lora_lightning.tasks.classification.ImageClassifier"}, "trainer": HERE}),
        _shape_of_vit(96),
        _shape_of_vit(224),
        Shape("conformer", "Conformer 128 x 2, sounds of 2 s, 0.9M", "transcribe", _conformer,
              {"vocabulary": VOCABULARY}, _sound,
              {"model": {"_target_": "lora_lightning.models.ctc.conformer_ctc", **CONFORMER},
               "data": {"_target_": "lora_lightning.data.accents.AccentsDataModule"},
               "task": {"_target_": "lora_lightning.tasks.ctc.SpeechRecognizer"}, "trainer": HERE}),
    )
}  # fmt: skip


@torch.no_grad()
def filled(shape: Shape, folder: Path, count: int) -> Path:
    """A folder with `count` adapters, `a0`, `a1`, …; those that are there already stay.

    Returns:
        The folder.
    """
    missing = [i for i in range(count) if not (folder / f"a{i}" / "adapter_config.json").is_file()]
    if not missing:
        return folder
    model = shape.adapted()
    heads = heads_of(model)
    for i in working(missing, f"writing {shape.name}", "adapters"):
        vary(model, heads, i)
        ll.save_adapter(model, folder / f"a{i}", origin={"facts": dict(shape.facts)})
    return folder


def heads_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what an adapter trains beside its updates."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    return {name: parameter.detach().clone() for name, parameter in own.items()}


@torch.no_grad()
def vary(model: nn.Module, heads: Mapping[str, torch.Tensor], seed: int) -> None:
    """Give the selected adapter values of its own: of every B, and around those of the heads."""
    generator = torch.Generator().manual_seed(seed)
    for update in (m for m in model.modules() if isinstance(m, LowRankUpdate)):
        update.lora_B.copy_(0.02 * torch.randn(update.lora_B.shape, generator=generator))
    for name, value in heads.items():
        model.get_parameter(name).copy_(value + 0.01 * torch.randn(value.shape, generator=generator))


def loaded(shape: Shape, folder: Path, count: int) -> nn.Module:
    """A model that holds the first adapters of a folder."""
    model = copy.deepcopy(shape.model()).eval()
    for i in range(count):
        ll.load_adapter(model, folder / f"a{i}", f"a{i}")
    return model


def file_bytes(folder: Path) -> int:
    """Of an adapter's tensors, with the head of their file."""
    return (folder / "adapter_model.safetensors").stat().st_size
