"""StreamedPictures: the pictures of shards as a set with indices, read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_lightning.data.decoding import Enough, read_picture
from lora_lightning.data.findings import DataError
from lora_lightning.data.picture_sets import PictureSet
from lora_lightning.data.stream_tar import Label, as_label
from lora_lightning.errors import did_you_mean
from lora_lightning.utils.tables import truncate_list


class Shards(Protocol):
    """Pictures with labels, by shard and place in it. Nothing is held of them but what is being read.

    Attributes:
        names: of the shards, for messages.
        counts: pictures of each.
        labels: every label there is; empty where only reading everything would tell.
        class_names: where the files say them.
    """

    names: list[str]
    counts: list[int]
    labels: set[Any]
    class_names: list[str] | None

    def read(self, shard: int, place: int) -> tuple[Any, Label | None]:
        """A picture, decoded or as the bytes of its file, and its label."""

    def labels_of(self, shard: int) -> Sequence[Label | None]:
        """The labels of a shard, without its pictures where the format allows it."""


class StreamedPictures(PictureSet):
    """The pictures of some shards, numbered through.

    Args:
        shards: the shards.
        numbers: which of them.
        class_names: the classes, of class 0 first; whole numbers as labels are classes already.
        by_name: not where other labels are words: then each is the name of a class.

    Raises:
        DataError: when a picture is read that cannot be, or has a label that is no class.
    """

    def __init__(
        self, shards: Shards, numbers: Sequence[int], class_names: Sequence[str], by_name: bool = False
    ) -> None:
        self.shards, self.numbers, self.by_name = shards, list(numbers), by_name
        self.counts = [shards.counts[n] for n in self.numbers]
        self.class_names = list(class_names)
        self._classes = {name: i for i, name in enumerate(class_names)}
        self._ends = np.cumsum(self.counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def targets(self) -> Tensor:  # type: ignore[override]  # read when asked for: a set may fit no memory
        """(n,) int64, class indices, of which the labels alone are read."""
        labels = [self._class(v, n, i) for n in self.numbers for i, v in enumerate(self.shards.labels_of(n))]
        return torch.tensor(labels, dtype=torch.int64)

    def picture(self, index: int, enough: Enough | None = None) -> Image.Image:
        return self.sample(index, enough)[0]

    def name(self, index: int) -> str:
        shard, place = self._where(index)
        return f"{Path(self.shards.names[shard]).name}: {place}"

    def sample(self, index: int, enough: Enough | None = None) -> tuple[Any, ...]:
        shard, place = self._where(index)
        data, label = self.shards.read(shard, place)
        try:
            picture = data if isinstance(data, Image.Image) else read_picture(bytes(data), enough)
        except DataError as error:
            raise DataError(f"{self.shards.names[shard]}: picture {place}: {error}") from None
        return picture, torch.tensor(self._class(label, shard, place))

    def _where(self, index: int) -> tuple[int, int]:
        nth = int(np.searchsorted(self._ends, index, side="right"))
        return self.numbers[nth], index - int(self._ends[nth] - self.counts[nth])

    def _class(self, label: Label | None, shard: int, place: int) -> int:
        name = str(label)
        found = -1 if isinstance(label, int) and not self.by_name else self._classes.get(name, -1)
        if found < 0 and not self.by_name and isinstance(number := as_label(label), int):
            found = number
        if not 0 <= found < len(self.class_names):
            where = f"{self.shards.names[shard]}: picture {place}"
            raise DataError(f"{where}: {unknown_labels([label], self.class_names)}")
        return found


def unknown_labels(labels: Sequence[Any], class_names: Sequence[str]) -> str:
    """What is said of labels that are no class."""
    words = sorted(map(str, labels))
    near = did_you_mean(words[0], class_names) if not words[0].isdecimal() else ""
    return (
        f"the label {truncate_list(words)} is none of the {len(class_names):,} classes "
        f"({truncate_list(class_names)}); whole numbers count from 0.{near} data.class_names=FILE names all "
        "classes, one a line."
    )
