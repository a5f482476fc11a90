"""Adapters of the embedded models as runs leave them, in folders; nothing is trained."""

import io
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import nn

import lora_lightning as ll
from lora_lightning.app.serve import catalog_of
from lora_lightning.app.served import engine_of
from lora_lightning.data.accents import VOCABULARY
from lora_lightning.data.audio import read_audio
from lora_lightning.models.timm import timm_model
from lora_lightning.serving.engine import Engine
from lora_lightning.serving.inputs import Limits

CORPUS = Path(ll.__file__).parent / "data" / "accents"
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FACTS = {
    "target": "class", "num_classes": 10, "class_names": NAMES, "temperature": 1.5,
    "input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic",
    "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
CONFIG = {
    "model": {"_target_": "lora_lightning.models.timm.timm_model", "name": "vit_tiny_patch16_224",
              "checkpoint": "vit_digits", "pretrained": False, **VIT},
    "data": {"_target_": "lora_lightning.data.digits.DigitsDataModule"},
    "task": {"_target_": "lora_lightning.tasks.classification.ImageClassifier"},
    "trainer": {"accelerator": "cpu", "precision": "32-true"},
}  # fmt: skip


def engine_for(options: dict, limits: Limits) -> Engine:
    return engine_of(options, [], catalog_of(options), limits)


def digits_base() -> nn.Module:
    return timm_model("vit_tiny_patch16_224", checkpoint="vit_digits", num_classes=10, **VIT).eval()


@torch.no_grad()
def varied(model: nn.Module, seed: int) -> None:
    """Give what is trained values of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if "lora_" in name else parameter + noise)


@torch.no_grad()
def save_digits(folder: Path, seed: int, facts: dict | None = None, **options) -> nn.Module:
    """An adapter with values of its own.

    Returns:
        The adapted model, by which answers are compared.
    """
    model = digits_base()
    ll.inject(model, ll.LoRAConfig(**{"rank": 2, **options}))
    varied(model, seed)
    ll.save_adapter(model, folder, origin={"recipe": "vit_digits", "config": CONFIG, "facts": facts or FACTS})
    return model.eval()


def picture(seed: int, size: tuple[int, int] = (20, 17), form: str = "PNG") -> bytes:
    """A file of random pixels, width and height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


SPEECH = {
    "model": {"_target_": "lora_lightning.models.ctc.conformer_ctc", "checkpoint": "conformer_us",
              "width": 128, "depth": 2, "dropout": 0.0},
    "data": {"_target_": "lora_lightning.data.accents.AccentsDataModule"},
    "task": {"_target_": "lora_lightning.tasks.ctc.SpeechRecognizer"},
    "trainer": {"accelerator": "cpu", "precision": "32-true"},
}  # fmt: skip


@torch.no_grad()
def save_speech(folder: Path, seed: int) -> None:
    """An adapter of the embedded recognizer that changes a little."""
    from lora_lightning.models.ctc import conformer_ctc

    model = conformer_ctc(VOCABULARY, **{k: v for k, v in SPEECH["model"].items() if k != "_target_"})
    ll.inject(model, ll.LoRAConfig(rank=2))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    origin = {"recipe": "accent_espeak", "config": SPEECH, "facts": {"vocabulary": VOCABULARY, "kept": []}}
    ll.save_adapter(model, folder, origin=origin)


def utterances(seconds: float, pause: float = 0.0, accent: str = "scottish") -> np.ndarray:
    """Speech of the embedded corpus, (samples,), 16 kHz, with silence in the middle."""
    wave = read_audio(CORPUS / f"{accent}-test.opus", 0.0, seconds).numpy()
    middle = len(wave) // 2
    return np.concatenate([wave[:middle], np.zeros(round(16_000 * pause), np.float32), wave[middle:]])


def sound(wave: np.ndarray, form: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format=form)
    return file.getvalue()
