"""What every detection data set shares: the record of an image, how it is read, and the loaders."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_lightning.data.decoding import opened_image
from lora_lightning.data.detection_transforms import PRESETS, DetectionTransform
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.grouped import GroupedOrder, aspect_groups
from lora_lightning.data.options import BatchSize, Seed, Workers
from lora_lightning.data.workers import loading_workers
from lora_lightning.trainer.loader import ResumableLoader
from lora_lightning.utils.checks import require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import one_of

with loading("torchvision"):
    from torchvision.io import ImageReadMode, decode_image

DECODED = (".jpg", ".jpeg", ".png", ".gif", ".webp")  # by torchvision; the rest by PIL

Augment = Annotated[str, one_of(*PRESETS)]
Part = Literal["train", "val", "test"]
Batch = tuple[list[Tensor], list[dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Sample:
    """An image file and the objects on it; nothing is read before it is needed.

    Attributes:
        width, height: in pixels.
        boxes: (n, 4), float32: left, top, right, bottom in pixels, the right and lower edges exclusive.
        labels: (n,), int64, from 1; 0 is the background.
        crowd: (n,), bool: regions that are neither trained on nor counted against a prediction.
        area: (n,), float32, pixels; small, medium and large objects are told by it.
        masks: gives (n, height, width), uint8; None where the data set has boxes alone.
    """

    file: Path
    image_id: int
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    masks: Callable[[], np.ndarray] | None = None


def read_image(file: str | os.PathLike[str]) -> Tensor:
    """An image as (3, height, width), uint8, whatever its mode; rotation marks in it are not applied.

    Raises:
        DataError: it is missing, damaged or no image.
    """
    path = Path(file)
    try:
        if path.suffix.lower() in DECODED:
            image = decode_image(str(path), mode=ImageReadMode.RGB)
            return image if image.dtype == torch.uint8 else (image.int() // 257).to(torch.uint8)
        with opened_image(path) as opened:
            return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, RuntimeError, ValueError, UnidentifiedImageError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} cannot be read as an image ({reason}). Copy it anew, or leave it out."
        ) from None


class DetectionImages(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Samples as torchvision's detectors take them: image (3, height, width) of uint8, and its target.

    The target holds boxes (n, 4) float32, labels (n,) int64, iscrowd (n,) int64, area (n,) float32,
    image_id, and masks (n, height, width) uint8 where there are any.

    Args:
        samples: what is in the set.
        preset: how training images are augmented; None for evaluation, which changes nothing and keeps
            the crowd regions, which training leaves out.
    """

    def __init__(self, samples: list[Sample], preset: str | None = None) -> None:
        self.samples = samples
        self.training = preset is not None
        self.transform = DetectionTransform(preset or "none")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        sample = self.samples[index]
        image = read_image(sample.file)
        if image.shape[-2:] != (sample.height, sample.width):
            raise DataError(
                f"{sample.file} is {image.shape[-1]} x {image.shape[-2]} pixels now, not "
                f"{sample.width} x {sample.height} as when the annotations were checked. "
                "Start anew, which checks them again."
            )
        kept = ~sample.crowd if self.training else np.ones(len(sample.labels), bool)
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(sample.boxes[kept]),
            "labels": torch.from_numpy(sample.labels[kept]),
            "iscrowd": torch.from_numpy(sample.crowd[kept].astype(np.int64)),
            "area": torch.from_numpy(sample.area[kept]),
            "image_id": torch.tensor(sample.image_id),
        }
        if sample.masks is not None:
            target["masks"] = torch.from_numpy(sample.masks()[kept])
        return self.transform(image, target)


def collate(batch: list[tuple[Tensor, dict[str, Any]]]) -> Batch:
    """Images differ in size: a list of them, and a list of targets."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


@functools.cache  # once, though several trainings of one program may use the data
def tell(text: str) -> None:
    """Print on rank zero."""
    rank_zero_only(print)(text, flush=True)


class DetectionDataModule(L.LightningDataModule):
    """Loaders over samples; a data set says in `read` where they come from.

    Training batches hold images of like shape, in an order that a resumed run takes up where it
    stopped. Workers hand over uint8; `on_after_batch_transfer` makes it float in [0, 1] on the device.

    Args:
        batch_size: images a batch and process.
        num_workers: loading processes; None takes the cores of this process, at most 8.
        seed: the order and augmentation of training images.
        augment: how training images are augmented: a key of
            `lora_lightning.data.detection_transforms.PRESETS`.
        strict: bad annotations are an error; otherwise they are dropped and counted.

    Attributes:
        provides: num_classes, the background not counted; class_names, that of label 1 first; and
            category_ids, where files number the classes otherwise.
        class_names, category_ids: the same.
        findings: the table of what the check has found, after setup; an empty text if nothing.

    Raises:
        ConfigError: one line for each bad option.
    """

    name = "the annotations"

    def __init__(
        self,
        batch_size: BatchSize,
        num_workers: Workers,
        seed: Seed,
        augment: Augment,
        strict: bool,
    ) -> None:
        super().__init__()
        require(DetectionDataModule, locals())
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.augment, self.strict = augment, strict
        self.findings = ""
        self.class_names: list[str] = []
        self.category_ids: list[int] = []
        self._parts: dict[Part, list[Sample]] = {}

    def read(self, findings: Findings) -> dict[Part, list[Sample]]:
        """All parts; what is wrong goes into `findings`. Sets `class_names` where only the files say them.

        Raises:
            MissingFileError: the data set is not there.
            DataError: it cannot be read at all.
        """
        raise NotImplementedError

    @property
    def provides(self) -> dict[str, Any]:
        if not self.class_names:
            self._read()
        facts = {"num_classes": len(self.class_names), "class_names": list(self.class_names)}
        return facts | ({"category_ids": list(self.category_ids)} if self.category_ids else {})

    def prepare_data(self) -> None:
        self._read()
        if self.findings:
            tell(f"{self.name}:\n\n{self.findings}\n")

    def setup(self, stage: str | None = None) -> None:
        self._read()

    def _read(self) -> None:
        if self._parts:
            return
        findings = Findings(self.name)
        parts = self.read(findings)
        self.findings = findings.settle(self.strict)
        if not any(len(s.labels) - s.crowd.sum() for s in parts["train"]):
            raise DataError(f"{self.name}: no box is left to train on.\n\n{self.findings}".rstrip())
        self._parts = parts

    def samples(self, part: Part) -> list[Sample]:
        """The images of a part; the test images are the validation images where there are no others."""
        self._read()
        return self._parts[part] if part in self._parts else self._parts["val"]

    def train_dataloader(self) -> DataLoader:
        samples = self.samples("train")
        order = GroupedOrder(aspect_groups([(s.width, s.height) for s in samples]), self.batch_size)
        return self._loader(
            DetectionImages(samples, self.augment), ResumableLoader, sampler=order, seed=self.seed
        )

    def val_dataloader(self) -> DataLoader:
        return self._loader(DetectionImages(self.samples("val")))

    def test_dataloader(self) -> DataLoader:
        return self._loader(DetectionImages(self.samples("test")))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, targets = batch
        images = [image.float().div_(255) for image in images]
        if self.trainer is not None:
            images = [self.trainer.precision_plugin.convert_input(image) for image in images]
        return images, targets

    def _loader(
        self, images: DetectionImages, make: Callable[..., DataLoader] = DataLoader, **options: Any
    ) -> DataLoader:
        workers = loading_workers(self.num_workers, self.trainer)
        return make(
            images,
            batch_size=self.batch_size,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            **options,
        )
