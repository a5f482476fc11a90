"""Pictures and their masks augmented together: torchvision.transforms.v2 as its segmentation models were
trained with; and what evaluation shows a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.data.mask_files import IGNORED
from lora_lightning.utils.libraries import loading

with loading("torchvision"):
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

FILL = (124, 116, 104)  # the mean of ImageNet, in which small pictures are set
JITTER = (0.5, 2.0)  # of torchvision's references and of DeepLab (Chen et al. 2017, arXiv 1706.05587)


class Rescale(v2.Transform):
    """Resizes by a factor drawn evenly.

    Args:
        shorter_side: of a picture at a factor of 1, in pixels; None is its own.
        jitter: least and greatest factor.
    """

    def __init__(self, shorter_side: int | None, jitter: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.shorter_side, self.jitter = shorter_side, jitter

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        factor = (self.shorter_side or min(height, width)) / min(height, width)
        if self.jitter[0] < self.jitter[1]:
            factor *= float(torch.empty(()).uniform_(*self.jitter))
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(functional.resize, inpt, **params, antialias=True)


def _flip() -> list[nn.Module]:
    return [v2.RandomHorizontalFlip()]


def _photometric() -> list[nn.Module]:
    return [v2.RandomPhotometricDistort(), v2.RandomHorizontalFlip()]


# Name -> factors of the size, and what is done beside.
PRESETS: dict[str, tuple[tuple[float, float], Callable[[], list[nn.Module]]]] = {
    "none": ((1.0, 1.0), list),
    "flip": ((1.0, 1.0), _flip),
    "scale": (JITTER, _flip),
    "photometric": (JITTER, _photometric),
}


class TrainingTransform:
    """A preset, and a crop of one size at a random place.

    Args:
        preset: a key of PRESETS.
        shorter_side: of a picture before it is scaled and cut, in pixels; None is its own.
        crop_size: height and width of what comes out; what a picture lacks is filled, and ignored.
    """

    def __init__(self, preset: str, shorter_side: int | None, crop_size: int) -> None:
        jitter, more = PRESETS[preset]
        fill: dict[type | str, Any] = {tv_tensors.Image: FILL, tv_tensors.Mask: IGNORED}
        crop = v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill)
        self.steps = v2.Compose([Rescale(shorter_side, jitter), crop, *more()])

    def __call__(self, picture: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A picture (3, height, width) and its mask (height, width) -> the same of the crop; uint8."""
        picture, mask = self.steps(tv_tensors.Image(picture), tv_tensors.Mask(mask))
        return picture.as_subclass(Tensor), mask.as_subclass(Tensor)


def evaluation_picture(picture: Tensor, shorter_side: int | None) -> Tensor:
    """A picture (3, height, width), uint8, as evaluation and prediction resize it."""
    return Rescale(shorter_side)(tv_tensors.Image(picture)).as_subclass(Tensor)
