"""MaskedPictures: pairs of a picture and a mask as a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.decoding import read_picture
from lora_lightning.data.findings import DataError
from lora_lightning.data.mask_check import Pair
from lora_lightning.data.mask_files import Legend
from lora_lightning.data.mask_transforms import TrainingTransform, evaluation_picture

Item = tuple[Tensor, Tensor, int]


class MaskedPictures(Dataset[Item]):
    """Pictures (3, height, width), their masks (height, width), both uint8, and their places in the part.

    Args:
        pairs: what is in the set.
        legend: what the codes of the masks mean.
        training: augments and cuts both; None resizes the picture as evaluation does and leaves the mask
            as it is.
        shorter_side: for evaluation.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        legend: Legend,
        training: TrainingTransform | None,
        shorter_side: int | None = None,
    ) -> None:
        self.pairs, self.legend = pairs, legend
        self.training, self.shorter_side = training, shorter_side

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Item:
        pair = self.pairs[index]
        picture = torch.from_numpy(np.array(read_picture(pair.picture))).permute(2, 0, 1)
        mask = torch.from_numpy(self.legend.read(pair.mask))
        if mask.shape != picture.shape[1:]:
            raise DataError(
                f"{pair.mask} has another size now than {pair.picture}, unlike when they were checked. "
                "Start anew, which checks them again."
            )
        if self.training:
            return *self.training(picture, mask), index
        return evaluation_picture(picture, self.shorter_side), mask, index


def columns(batch: list[Item]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Pictures of a batch differ in size: three lists."""
    pictures, masks, places = zip(*batch, strict=True)
    return list(pictures), list(masks), list(places)
