"""Architecture: one model under test: how it is built, what it is fed, what is known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SECOND = 1600  # samples of a "second" of sound, enough for a few frames


@dataclass(frozen=True)
class Architecture:
    """One model and what is known about it.

    Attributes:
        build: makes it; works under `torch.device("meta")`.
        batch: what it is called with in eval mode: positional arguments, or keyword arguments.
        train_batch: the same in train mode, None when it is no other.
        quick: all checks run by default, not only with `-m slow`.
        large: only planned, for the library cannot build it small.
        dead_in_train, dead_in_eval: parts of the names of updates to which the architecture itself brings
            no gradient in that mode -> why.
        tolerances: a check's name -> the looser tolerance and why.
        impossible: a check's name -> why the base model itself fails it.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    train_batch: Callable[[], Any] | None = None
    quick: bool = False
    large: bool = False
    dead_in_train: dict[str, str] = field(default_factory=dict)
    dead_in_eval: dict[str, str] = field(default_factory=dict)
    tolerances: dict[str, tuple[float, str]] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)


class Holder(nn.Module):
    """Holds a model as a LightningModule does: a model's attribute `backbone` is no longer its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


def held(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Holder(build())


def images(size: int = 32, count: int = 2) -> Callable[[], Any]:
    return lambda: (torch.rand(count, 3, size, size),)


def sound(seconds: int = 1) -> Callable[[], Any]:
    return lambda: (torch.randn(2, seconds * SECOND),)
