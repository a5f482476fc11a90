"""Images held in arrays as a dataset, and their split into parts that hold every class alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


class ImageArrays(Dataset[tuple[Tensor, Tensor]]):
    """Arrays (n, 32, 32, 3), uint8, and labels (n,), seen through a transform of PIL images."""

    def __init__(self, data: np.ndarray, labels: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.data, self.labels, self.transform = data, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(Image.fromarray(self.data[index])), self.labels[index]


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
