"""DigitsDataModule: scikit-learn's handwritten digits in two domains, rendered at 16 x 16."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning.data.options import BatchSize, Seed
from lora_lightning.trainer.loader import ResumableLoader
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import between

SIZE = 16
POOL, VAL = 900, 300  # the remaining 597 of the 1797 scans are the test images
SPLIT_SEED, VAL_SEED, TEST_SEED = 0, 1, 2
EVAL_BATCH_SIZE = 128
MEAN, STD = 0.3, 0.35


class DigitsDataModule(L.LightningDataModule):
    """Real scans of handwritten digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0).

    The 1797 scans are split once and for all, whatever the options: 900 to train on, 300 for
    validation, 597 for testing. Validation and test images are rendered once with fixed seeds;
    training images anew for each batch, on the batch's device, from torch's global generator.
    Batches are images (batch, 3, 16, 16), normalized, and labels (batch,).

    Args:
        domain: "source", upright white digits on black with a little jitter, or "target", turned by
            up to 30 degrees in coloured ink on a dark textured ground with noise.
        train_size: how many of the 900 training scans are used: the first ones.
        batch_size: training images a batch.
        seed: the order of the training images.

    Raises:
        ConfigError: one line for each bad option.
    """

    def __init__(
        self,
        domain: Literal["source", "target"] = "target",
        train_size: Annotated[int, between(1, POOL)] = 300,
        batch_size: BatchSize = 32,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        require(DigitsDataModule, locals())
        self.save_hyperparameters()
        self.provides = {"target": "class", "num_classes": 10, "class_names": list(map(str, range(10)))}
        self.domain, self.train_size, self.batch_size, self.seed = (
            domain,
            train_size,
            batch_size,
            seed,
        )

    def setup(self, stage: str | None = None) -> None:
        scans, labels = load_scans()
        pool, val, test = split_indices()
        train = pool[: self.train_size]
        self.train_set = TensorDataset(scans[train], labels[train])
        self.val_set = TensorDataset(self._render_fixed(scans[val], VAL_SEED), labels[val])
        self.test_set = TensorDataset(self._render_fixed(scans[test], TEST_SEED), labels[test])

    def train_dataloader(self) -> DataLoader:
        return ResumableLoader(self.train_set, self.batch_size, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, EVAL_BATCH_SIZE)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, EVAL_BATCH_SIZE)

    def source_dataloader(self) -> DataLoader:
        """The test images as the shipped models' pretraining has seen the digits: upright, white on black."""
        scans, labels = load_scans()
        test = split_indices()[2]
        images = render(scans[test], "source", torch.Generator().manual_seed(TEST_SEED))
        return DataLoader(TensorDataset(images, labels[test]), EVAL_BATCH_SIZE)

    def show(self, part: Literal["train", "val", "test"], index: int) -> tuple[str, Image.Image]:
        """Name and picture of a part's sample, for reports: of the training part the bare scan."""
        image = {"train": self.train_set, "val": self.val_set, "test": self.test_set}[part][index][0]
        image = image.expand(3, -1, -1) if part == "train" else image * STD + MEAN
        pixels = (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0)
        return f"{part} digit {index}", Image.fromarray(pixels.numpy())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Render the scans of a training batch; the other batches are rendered already."""
        if not (self.trainer and self.trainer.training):
            return batch
        scans, labels = batch
        images = render(scans.float(), self.domain)
        return self.trainer.precision_plugin.convert_input(images), labels

    def preprocessing(self) -> dict[str, Any]:
        """What a model is shown of a picture, as `data.picture_transform.preprocessing_of` says it."""
        mean_std = {"mean": [MEAN] * 3, "std": [STD] * 3}
        fitted = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
        return {"input_size": [3, SIZE, SIZE], **mean_std, **fitted}

    def _render_fixed(self, scans: Tensor, seed: int) -> Tensor:
        return render(scans, self.domain, torch.Generator().manual_seed(seed))


def load_scans() -> tuple[Tensor, Tensor]:
    """All 1797 scans, (n, 1, 16, 16) with ink 1 on 0, scaled up from 8 x 8, and labels (n,)."""
    digits = load_digits()
    scans = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    scans = F.interpolate(scans, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return scans, torch.tensor(digits.target)


def split_indices() -> tuple[Tensor, Tensor, Tensor]:
    """The fixed training pool (900), validation (300) and test (597) indices, disjoint."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[:POOL], order[POOL : POOL + VAL], order[POOL + VAL :]


def render(scans: Tensor, domain: str, generator: torch.Generator | None = None) -> Tensor:
    """Draw scans in a domain.

    Args:
        scans: (n, 1, 16, 16), ink 1 on ground 0.
        domain: "source" or "target".
        generator: where the random numbers come from, on the device of `scans`; None takes
            torch's global one.

    Returns:
        Images (n, 3, 16, 16), normalized by the mean 0.3 and the standard deviation 0.35.
    """
    count, device = len(scans), scans.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

    if domain == "source":
        ink = _place(scans, uniform(-10, 10), uniform(0.9, 1.1), uniform(-0.1, 0.1, 2))
        images = ink.expand(-1, 3, -1, -1)
    else:
        ink = _place(scans, uniform(-30, 30), uniform(0.8, 1.1), uniform(-0.12, 0.12, 2))
        colour = uniform(0.35, 1, 3, 1, 1)
        ground = F.interpolate(uniform(0, 1, 3, 4, 4), size=(SIZE, SIZE), mode="bicubic")
        ground = 0.45 * ground.clamp(0, 1)
        images = torch.maximum(ink * colour, ground * (1 - ink))
        noise = torch.randn(images.shape, generator=generator, device=device)
        images = (images + 0.06 * noise).clamp(0, 1)
    return (images - MEAN) / STD


def _place(scans: Tensor, degrees: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Turn, scale and shift scans: degrees and scale (n,), shift (n, 2) in half image widths."""
    angle = torch.deg2rad(degrees)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # The inverse map: where in the scan each pixel of the image comes from, (n, 2, 3).
    inverse = torch.stack((cos, -sin, shift[:, 0], sin, cos, shift[:, 1]), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(inverse, list(scans.shape), align_corners=False)
    return F.grid_sample(scans, grid, align_corners=False)
