"""Confusions: which class was found where which was, picture by picture, for one process and for many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lora_lightning.tasks.bootstrap import intervals

Cells = tuple[np.ndarray, np.ndarray]  # places in a (classes, classes) matrix, row by row, and pixels at each


class Confusions:
    """Counts the pixels of pictures by their class and the class that was found there.

    A picture that several processes have seen, to fill up their last batches, counts once.

    Args:
        classes: how many there are.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._pictures: dict[int, Cells] = {}

    def add(self, picture: int, found: Tensor, truth: Tensor) -> None:
        """One picture.

        Args:
            picture: its number in the data.
            found: (height, width), classes.
            truth: (height, width); values that are no class, such as 255, are left out.
        """
        known = truth < self.classes
        places = truth[known].long() * self.classes + found[known].long()
        counts = torch.bincount(places, minlength=self.classes**2).cpu()
        cells = counts.nonzero()[:, 0]
        self._pictures[picture] = cells.numpy(), counts[cells].numpy()

    def reset(self) -> None:
        self._pictures = {}

    def picture_miou(self, picture: int) -> float:
        """Of one picture of this process; 1 where it has no pixel of any class."""
        return Segmentation(self.classes, self._pictures).picture_miou(picture)

    def all(self) -> Segmentation:
        """Of the pictures of all processes, in their order."""
        pictures = self._pictures
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shares: list[dict[int, Cells]] = [{}] * dist.get_world_size()
            dist.all_gather_object(shares, pictures)
            pictures = {number: cells for share in shares for number, cells in share.items()}
        return Segmentation(self.classes, {number: pictures[number] for number in sorted(pictures)})


@dataclass(frozen=True)
class Segmentation:
    """What was found in the pictures of a part.

    Attributes:
        pictures: number of a picture -> its non-empty cells.
    """

    classes: int
    pictures: dict[int, Cells]

    def matrix(self) -> np.ndarray:
        """(classes, classes), pixels: a row for each true class, a column for each that was found."""
        whole = np.zeros(self.classes**2, np.int64)
        for places, counts in self.pictures.values():
            whole[places] += counts
        return whole.reshape(self.classes, self.classes)

    def scores(self) -> dict[str, float]:
        """`miou`, the mean intersection over union of the classes that are somewhere or were found somewhere,
        and `acc`, the share of pixels that are right; nothing where there are no pixels."""
        matrix = self.matrix()
        if not matrix.sum():
            return {}
        return {"miou": float(np.nanmean(ious(matrix))), "acc": float(matrix.trace() / matrix.sum())}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of these scores, by the bootstrap over pictures."""
        if not self.pictures:
            return {}
        right, true, found = self._sums()

        def statistic(counts: np.ndarray) -> np.ndarray:
            hit, there, said = (counts.astype(np.float64) @ sums for sums in (right, true, found))
            with np.errstate(invalid="ignore"):
                each = hit / (there + said - hit)  # (resamples, classes)
                mean = np.nansum(each, 1) / (~np.isnan(each)).sum(1)
                return np.stack([mean, hit.sum(1) / there.sum(1)], 1)

        bounds = intervals(statistic, len(self.pictures))
        return {
            name: (float(low), float(high)) for name, (low, high) in zip(("miou", "acc"), bounds, strict=True)
        }

    def class_intervals(self) -> np.ndarray:
        """(classes, 2), of each class's intersection over union, likewise; NaN of one that is nowhere."""
        right, true, found = self._sums()

        def statistic(counts: np.ndarray) -> np.ndarray:
            hit, there, said = (counts.astype(np.float64) @ sums for sums in (right, true, found))
            with np.errstate(invalid="ignore"):
                return hit / (there + said - hit)  # (resamples, classes)

        return intervals(statistic, len(self.pictures))

    def _sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels of each picture and class that are right, that are of it, that were found as it."""
        right, true, found = np.zeros((3, len(self.pictures), self.classes))
        for row, (places, counts) in enumerate(self.pictures.values()):
            rows, columns = np.divmod(places, self.classes)
            np.add.at(true[row], rows, counts)
            np.add.at(found[row], columns, counts)
            same = rows == columns
            right[row, rows[same]] = counts[same]
        return right, true, found

    def picture_miou(self, picture: int) -> float:
        """Of one picture; 1 where it has no pixel of any class."""
        alone = Segmentation(self.classes, {picture: self.pictures[picture]})
        return alone.scores().get("miou", 1.0)

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """The pairs of classes that are most often taken for each other: true class, found class, pixels."""
        wrong = self.matrix()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [(int(p) // self.classes, int(p) % self.classes, int(wrong.flat[p])) for p in order]
        return [pair for pair in pairs if pair[2]]


def ious(matrix: np.ndarray) -> np.ndarray:
    """(classes,), the intersection over union of each class (Everingham et al. 2010); NaN for one that is
    neither there nor found."""
    right = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - right
    return np.divide(right, union, out=np.full(len(matrix), np.nan), where=union > 0)


def named_ious(matrix: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """`iou/NAME` of the classes that have one."""
    pairs = zip(names, ious(matrix).tolist(), strict=True)
    return {f"iou/{name}": value for name, value in pairs if value == value}
