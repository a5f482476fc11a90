"""ShapesDataModule: pictures of shapes in two domains, drawn as they are asked for, with their boxes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_lightning.data.drawing import CLASSES, DOMAINS, draw
from lora_lightning.data.options import BatchSize, Count, Seed
from lora_lightning.trainer.loader import ResumableLoader
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import at_least

SPLITS = ("train", "val", "test")
EVAL_BATCH_SIZE = 32
Sample = tuple[Tensor, dict[str, Any]]


class Shapes(Dataset[Sample]):
    """The first `size` pictures of a split: image (3, side, side) in [0, 1] and its target.

    A picture is a function of the domain, the split, its index and its side alone. It is drawn when it is
    first asked for, and kept.

    Args:
        flip: turn a picture left to right half of the time, by torch's global generator.
    """

    def __init__(self, domain: str, split: str, size: int, side: int, flip: bool = False) -> None:
        self.domain, self.split, self.size, self.side, self.flip = domain, split, size, side, flip
        self._drawn: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index not in self._drawn:
            seed = (DOMAINS.index(self.domain), SPLITS.index(self.split), index)
            self._drawn[index] = draw(self.domain, self.side, seed)
        pixels, boxes, labels = self._drawn[index]
        image = pixels.float() / 255
        if self.flip and torch.rand(()) < 0.5:
            image, (x1, y1, x2, y2) = image.flip(2), boxes.unbind(1)
            boxes = torch.stack((self.side - x2, y1, self.side - x1, y2), 1)
        return image, {"boxes": boxes.clone(), "labels": labels.clone(), "image_id": index}


class ShapesDataModule(L.LightningDataModule):
    """Detection in pictures that are drawn, not found: nothing is downloaded.

    Batches are two lists: images (3, side, side) in [0, 1], and targets with `boxes` (n, 4), x1 y1 x2 y2
    in pixels, `labels` (n,) from 1 and `image_id`. A box holds the whole shape as far as it is inside the
    picture, also where another shape covers it. Training, validation and test pictures have nothing in
    common; validation and test pictures are the same for every seed.

    Args:
        domain: "source", upright filled shapes on even ground, of every class but the last; "target",
            shapes of every class, turned, patterned or drawn as outlines, on textured ground with
            distractors, uneven light and noise.
        train_size: training pictures.
        val_size: validation pictures.
        test_size: test pictures.
        side: height and width of a picture, in pixels.
        batch_size: training pictures a batch.
        seed: the order of the training pictures, and which are flipped.

    Raises:
        ConfigError: one line for each bad option.
    """

    provides: dict[str, Any] = {"num_classes": len(CLASSES), "class_names": list(CLASSES)}  # noqa: RUF012  # a fact

    def __init__(
        self,
        domain: Literal["source", "target"] = "target",
        train_size: Count = 240,
        val_size: Count = 100,
        test_size: Count = 200,
        side: Annotated[int, at_least(32)] = 128,
        batch_size: BatchSize = 16,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        require(ShapesDataModule, locals())
        self.save_hyperparameters()
        self.batch_size, self.seed = batch_size, seed
        self.train_set = Shapes(domain, "train", train_size, side, flip=True)
        self.val_set = Shapes(domain, "val", val_size, side)
        self.test_set = Shapes(domain, "test", test_size, side)

    def train_dataloader(self) -> DataLoader:
        return ResumableLoader(
            self.train_set, self.batch_size, shuffle=True, seed=self.seed, collate_fn=listed_batch
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, EVAL_BATCH_SIZE, collate_fn=listed_batch)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, EVAL_BATCH_SIZE, collate_fn=listed_batch)


def listed_batch(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Images and targets as two lists: images of a batch may differ in size."""
    return [image for image, _ in samples], [target for _, target in samples]
