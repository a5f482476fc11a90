"""PictureSet: pictures and their targets before any transform; its parts, and how it is seen by a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.decoding import Enough
from lora_lightning.data.findings import DataError

TRIES = 16  # pictures that may be lost in a row before the disk is taken to be


class PictureSet(Dataset[tuple[Any, ...]]):
    """Pictures with their targets: index -> (RGB picture, target) or (RGB picture, target, weight).

    A subclass sets `targets`, perhaps `weights`, and says in `picture` how one is read.

    Attributes:
        targets: (n,) int64, class indices; (n, classes) float32, of 0 and 1; or (n,) float32, numbers. Known
            without reading a picture.
        weights: (n,) float32, of the pictures' losses; None where all count alike.
    """

    targets: Tensor
    weights: Tensor | None = None

    def picture(self, index: int, enough: Enough | None = None) -> Image.Image:
        """The picture as it is on the disk, in RGB; scaled down where fewer pixels are `enough` and that is
        faster, as `read_picture` does."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """By which a person finds the picture."""
        return str(index)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.sample(index)

    def sample(self, index: int, enough: Enough | None = None) -> tuple[Any, ...]:
        """As by index, with a picture that may be scaled down."""
        item = self.picture(index, enough), self.targets[index]
        return item if self.weights is None else (*item, self.weights[index])


class PicturePart(PictureSet):
    """Some pictures of a set, by their indices in it."""

    def __init__(self, whole: PictureSet, indices: Tensor) -> None:
        self.whole, self.indices = whole, indices
        self.targets = whole.targets[indices]
        self.weights = None if whole.weights is None else whole.weights[indices]

    def picture(self, index: int, enough: Enough | None = None) -> Image.Image:
        return self.whole.picture(int(self.indices[index]), enough)

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    def sample(self, index: int, enough: Enough | None = None) -> tuple[Any, ...]:
        return self.whole.sample(int(self.indices[index]), enough)


class Shown(Dataset[tuple[Any, ...]]):
    """A set seen through a transform of pictures.

    A picture that cannot be read any more ends no run: the next one that can be takes its place, and this is
    told when it happens first.

    Args:
        enough: what the transform will need of a picture, as for `read_picture`; None takes all.

    Attributes:
        lost: (n,) bool, the pictures that could not be read; shared with the loading processes.

    Raises:
        DataError: TRIES pictures one after the other cannot be read.
    """

    def __init__(
        self,
        pictures: PictureSet,
        transform: Callable[[Image.Image], Tensor],
        enough: Enough | None = None,
    ) -> None:
        self.pictures, self.transform, self.enough = pictures, transform, enough
        self.lost = torch.zeros(len(pictures), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        for step in range(TRIES):
            place = (
                (index + step) % len(self) if step else index
            )  # which may be one too many, as it ends a loop
            try:
                picture, *rest = self.pictures.sample(place, self.enough)
            except DataError as error:
                if not self.lost.any():
                    print(f"{error} The next picture takes its place.", file=sys.stderr, flush=True)
                self.lost[place] = True
            else:
                return self.transform(picture), *rest
        raise DataError(
            f"{TRIES} pictures one after the other cannot be read, such as {self.pictures.name(index)}: "
            "look whether the files are still there."
        )


def stratified_split(labels: Tensor, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices for training and for validation, each class in its share of the whole.

    Args:
        labels: (n,), class indices.
        val_size: length of the second part.
        seed: of the shuffling; the same seed gives the same split.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        # The first k / n of each class come first in the common order, whatever its n.
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    ranked = order[position[order].argsort(stable=True)]
    return ranked[val_size:].sort().values, ranked[:val_size].sort().values


def first_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices of `shots` pictures of each class, drawn by the seed; all of a class that has fewer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = [order[labels[order] == label][:shots] for label in labels.unique()]
    return torch.cat(kept).sort().values
