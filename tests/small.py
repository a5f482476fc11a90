"""Small models and LightningModules that the tests adapt."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoRAConfig, inject, lora_parameters
from lora_lightning.files.checkpoint_digests import add_digests


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, dilation=2, padding="same"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


class Net(nn.Module):
    """Like a timm model: convolutions, a norm and a head that get_classifier names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def get_classifier(self):
        return self.fc


def vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
    )


def encoder() -> nn.Module:
    """Reads out_proj.weight and linear1.weight without calling those layers."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


BATCHES = {
    mlp: lambda: torch.randn(5, 6),
    cnn: lambda: torch.randn(4, 3, 10, 10),
    vit: lambda: torch.randn(2, 3, 16, 16),
    encoder: lambda: torch.randn(3, 7, 16),
}


def pretrained(build: Callable[[], nn.Module]) -> nn.Module:
    """The same base each time, as from a file; the numbers that follow are not touched."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build()


def adapted(build, seed: int = 0, **options) -> nn.Module:
    """A model whose updates all change something."""
    torch.manual_seed(seed)
    model = build()
    inject(model, LoRAConfig(rank=2, **options))
    with torch.no_grad():
        for parameter in lora_parameters(model):
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def moved(model: nn.Module) -> nn.Module:
    """With updates that are not zero."""
    torch.manual_seed(2)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


class Classifier(pl.LightningModule):
    """A user's module: a network, a loss, an optimizer over all its parameters."""

    def __init__(self, model: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.model = pretrained(cnn) if model is None else model
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def loader(build=cnn, size: int = 16, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    shape = BATCHES[build]().shape[1:]
    x = torch.randn(size, *shape, generator=generator)
    y = torch.randint(0, 3, (size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(tmp_path, *callbacks, **options) -> pl.Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def save_checkpoint(checkpoint: dict, path) -> None:
    """As a Trainer with LoRACallback would write it: with checksums of what is in it now."""
    add_digests(checkpoint)
    torch.save(checkpoint, path)
