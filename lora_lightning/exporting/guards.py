"""Sizes at which a model goes another way than for its example. A graph has one way alone, and most runtimes
take it for every size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from lora_lightning.exporting.subject import Axes, Subject

LONGEST = 4096  # sizes of an axis, from the example's on, that are looked at


@dataclass(frozen=True)
class Elsewhere:
    """Inputs of a size that a graph was not traced for.

    Attributes:
        inputs: by name.
        where: the size, in words.
        larger: whether it is above the example's.
    """

    inputs: dict[str, Tensor]
    where: str
    larger: bool


class _Sized:
    """What a condition asks of an input."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = list(shape)

    def size(self) -> list[int]:
        return self.shape


def elsewhere(subject: Subject, inputs: Mapping[str, Tensor], axes: Axes) -> list[Elsewhere]:
    """Inputs of the nearest sizes, above and below the example's, at which each condition of the graph does
    not hold; of one axis at a time, but for those of one name.

    Args:
        subject: of which a graph was made.
        inputs: an example of the model's own inputs, which come first among the subject's.
        axes: the dynamic axes of these.
    """
    conditions = [(text, compile(text, "<guard>", "eval")) for text in subject.guards]
    names = list(dict.fromkeys(text for found in axes.values() for text in found.values()))
    places = {
        text: [(name, axis) for name, found in axes.items() for axis, t in found.items() if t == text]
        for text in names
    }
    found: dict[tuple[str, int], Elsewhere] = {}
    for text in names:
        name, axis = places[text][0]
        size = subject.inputs[name].shape[axis]
        for condition in conditions:
            if not any(_asks(condition[0], list(subject.inputs).index(n), a) for n, a in places[text]):
                continue
            for sizes in (range(size + 1, size + LONGEST), range(size - 1, 0, -1)):
                other = next(_violating(condition[1], subject, places[text], sizes), None)
                if other is not None and (text, other) not in found:
                    given = {
                        n: _resized(subject.inputs[n], [a for m, a in places[text] if m == n], other)
                        for n in inputs
                    }
                    where = f"axis {axis} of {name} is {other}"
                    found[text, other] = Elsewhere(given, where, other > size)
    return list(found.values())


def _asks(text: str, number: int, axis: int) -> bool:
    return f"[{number}].size()[{axis}]" in text


def _violating(
    condition: CodeType, subject: Subject, places: Sequence[tuple[str, int]], sizes: range
) -> Iterator[int]:
    """Those of some sizes at which a condition does not hold."""
    given = {name: _Sized(tensor.shape) for name, tensor in subject.inputs.items()}
    space: dict[str, Any] = {"L": {"inputs": [*given.values()]}, "torch": torch, "math": math}
    for size in sizes:
        for name, axis in places:
            given[name].shape[axis] = size
        try:
            if not eval(condition, space):  # torch's own text, of the graph that was just made
                yield size
        except (ArithmeticError, NameError):  # no such size, or no arithmetic of sizes alone
            continue


def _resized(tensor: Tensor, axes: Sequence[int], size: int) -> Tensor:
    """An input of another size, by its own entries one after the other."""
    for axis in axes:
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor
