"""Targets of other data in the numbers of a model's own classes, matched by the classes' names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.utils.tables import truncate_list


def by_name(theirs: Sequence[str], own: Sequence[str], nothing: Sequence[str] = ()) -> list[int]:
    """For each class of the data the number that the model has for it.

    Args:
        nothing: names that stand for no class; they have number 0, which nothing has.

    Raises:
        UserError: the model does not know a class, by name.
    """
    places = {name: number for number, name in enumerate(own)}
    if unknown := [name for name in theirs if name not in places and name not in nothing]:
        near = did_you_mean(unknown[0], own)
        raise UserError(
            f"the data have {truncate_list([repr(name) for name in unknown])}, which the model was not "
            f"trained on.{near} Its classes: {truncate_list(list(own), most=8)}. Name the classes as it "
            "does, or leave these out."
        )
    return [places.get(name, 0) for name in theirs]


class Relabelled:
    """The batches of a loader with their targets renumbered.

    Args:
        loader: of (images, targets, …). Targets are class indices, of any shape; (batch, classes) zeros and
            ones; lists of masks of indices; or dicts with `labels` from 1.
        numbers: from `by_name`.
        count: of the model's classes.
    """

    def __init__(self, loader: Any, numbers: Sequence[int], count: int) -> None:
        self.loader, self.count = loader, count
        self.numbers = torch.tensor(numbers, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for images, targets, *rest in self.loader:
            yield images, self._own(targets), *rest

    def _own(self, targets: Any) -> Any:
        if isinstance(targets, Tensor):
            return self._indices(targets) if not targets.is_floating_point() else self._several(targets)
        if targets and isinstance(targets[0], Tensor):
            return [self._indices(one) for one in targets]
        return [{**one, "labels": self._indices(one["labels"] - 1) + 1} for one in targets]

    def _indices(self, labels: Tensor) -> Tensor:
        """Numbers beyond the classes, such as the 255 of a mask's margin, stay."""
        known = labels < len(self.numbers)
        return torch.where(known, self.numbers[labels.long().clamp(0, len(self.numbers) - 1)], labels.long())

    def _several(self, targets: Tensor) -> Tensor:
        found = targets.new_zeros(len(targets), self.count)
        found[:, self.numbers] = targets
        return found
