"""Weights of torchvision's enumerations, read in this package's way: theirs unpickles."""

from __future__ import annotations

import inspect
from pathlib import Path

from lora_lightning.utils.download import DOWNLOAD_AGAIN, url_file
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.torch_file import read_torch

with loading("torchvision"):
    from torchvision.models import WeightsEnum, get_model_builder


def backbone_weights(name: str) -> WeightsEnum:
    """What a builder of torchvision takes as `weights_backbone`: its own default, read from torch's cache
    or fetched into it.

    Raises:
        MissingFileError: the weights are not on this machine and cannot be had now.
    """
    default = inspect.signature(get_model_builder(name)).parameters["weights_backbone"].default
    return _read_by(default, url_file(f"{name}'s backbone", default.url))


def _read_by(weights: WeightsEnum, path: Path) -> WeightsEnum:
    """torchvision takes members of its own enumerations alone: this is a copy of one, which is not listed in
    it and reads this file."""
    copied = object.__new__(type(weights))
    vars(copied).update(vars(weights))
    vars(copied)["get_state_dict"] = lambda *_, **__: read_torch(path, DOWNLOAD_AGAIN)
    return copied
