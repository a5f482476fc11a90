"""Which tracker a logger has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_lightning.trainer.trackers.aim import AimTracker
from lora_lightning.trainer.trackers.comet import CometTracker
from lora_lightning.trainer.trackers.csv import CSVTracker
from lora_lightning.trainer.trackers.mlflow import MLflowTracker
from lora_lightning.trainer.trackers.tensorboard import TensorBoardTracker
from lora_lightning.trainer.trackers.tracker import Tracker
from lora_lightning.trainer.trackers.wandb import WandbTracker

TRACKERS: dict[str, type[Tracker]] = {
    "WandbLogger": WandbTracker,
    "TensorBoardLogger": TensorBoardTracker,
    "MLFlowLogger": MLflowTracker,
    "CometLogger": CometTracker,
    "CSVLogger": CSVTracker,
    "AimLogger": AimTracker,
}


def tracker_of(logger: Any) -> Tracker:
    """By the name of its class, or of the one that it is derived from: no logger's library is asked for."""
    names = (c.__name__ for c in type(logger).__mro__)
    return next((TRACKERS[name] for name in names if name in TRACKERS), Tracker)(logger)


def trackers_of(loggers: Iterable[Any]) -> list[Tracker]:
    """One of each logger."""
    return [tracker_of(logger) for logger in loggers]


def most_examples(loggers: Iterable[Any]) -> int:
    """How many pictures or sounds the one that takes most of them may have; 0 is none."""
    return max((t.allowed.examples for t in trackers_of(loggers) if t.shows), default=0)
