"""What a classifier has said of every picture of a part, in the order of the data, on every process alike."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from lora_lightning.tasks.classification_losses import Target
from lora_lightning.tasks.reporting import AFTER, BEFORE


@dataclass
class Predictions:
    """Of the pictures of a part, in order.

    Attributes:
        target: "class", "classes" or "number".
        outputs: (count, classes), float32 on the CPU: logits, which no temperature has touched, or numbers.
        truths: (count,) class indices or numbers; (count, classes) zeros and ones.
        before: the same outputs before training; None where nobody knows them.
        temperature: what divides the logits before they are made probabilities; None where none was fitted.
        temperature_before: the same of those before training.
        now: the word for the model that has said this, as of `Reporting`.
    """

    target: Target
    outputs: Tensor
    truths: Tensor
    before: Tensor | None = None
    temperature: float | None = None
    temperature_before: float | None = None
    now: str = AFTER

    def __len__(self) -> int:
        return len(self.truths)

    @property
    def classes(self) -> int:
        return self.outputs.shape[1]

    @property
    def predicted(self) -> Tensor:
        """(count,) the class of the greatest logit; (count, classes) zeros and ones; (count,) numbers."""
        if self.target == "class":
            return self.outputs.argmax(1)
        return (self.outputs > 0).long() if self.target == "classes" else self.outputs[:, 0]

    def probabilities(self, calibrated: bool = True) -> Tensor:
        """(count, classes), of classes."""
        return probabilities(self.outputs, self.target, (calibrated and self.temperature) or 1.0)

    def probabilities_of(self, index: int) -> Tensor:
        """(classes,), calibrated, of one picture."""
        return probabilities(self.outputs[index], self.target, self.temperature or 1.0)

    def in_units(self, mean: float, std: float) -> Predictions:
        """Of standardized numbers, in the units of the data."""
        before = None if self.before is None else numbers(self.before, mean, std)
        return replace(self, outputs=numbers(self.outputs, mean, std), before=before)

    def as_before(self) -> Predictions | None:
        """Those of the model before training."""
        if self.before is None:
            return None
        return Predictions(
            self.target, self.before, self.truths, temperature=self.temperature_before, now=BEFORE
        )

    def states(self) -> dict[str, Predictions]:
        """Those of before, if there are any, and these, by the words for them."""
        before = self.as_before()
        return {self.now: self} if before is None else {BEFORE: before, self.now: self}


def probabilities(logits: Tensor, target: Target, temperature: float = 1.0) -> Tensor:
    """The probabilities (…, classes) of logits: of exactly one class, or of each class by itself."""
    scaled = logits.float() / temperature
    return scaled.softmax(-1) if target == "class" else scaled.sigmoid()


def numbers(outputs: Tensor, mean: float, std: float) -> Tensor:
    """What standardized outputs (…, 1) mean, in the units of the data."""
    return outputs.float() * std + mean


@dataclass
class Collector:
    """Gathers the outputs of an evaluation batch by batch."""

    outputs: list[Tensor] = field(default_factory=list)
    truths: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)

    def add(self, outputs: Tensor, truths: Tensor, before: Tensor | None = None) -> None:
        """A batch, moved to the CPU."""
        self.outputs.append(outputs.detach().float().cpu())
        self.truths.append(truths.detach().cpu())
        if before is not None:
            self.before.append(before.detach().float().cpu())

    def all(self, target: Target, loader: Any) -> Predictions | None:
        """Of the whole part; None where there was no batch.

        Args:
            loader: which gave the batches: where it gives each process a share, all of them are put together
                in the order of the data, and what fills up the last shares is left out.
        """
        if not self.outputs:
            return None
        columns = [torch.cat(column) for column in (self.outputs, self.truths, self.before) if column]
        if isinstance(sampler := getattr(loader, "sampler", None), DistributedSampler):
            columns = [_together(column, len(sampler.dataset)) for column in columns]  # type: ignore[arg-type]  # it has one
        return Predictions(target, columns[0], columns[1], columns[2] if len(columns) > 2 else None)


def _together(rows: Tensor, count: int) -> Tensor:
    """The rows of every process: the first of each, then the second of each, as the sampler deals them."""
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, rows)
    dealt = torch.stack(shares, dim=1)  # (of each, processes, …)
    return dealt.flatten(0, 1)[:count]
