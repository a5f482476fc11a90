"""Random crops of training pictures, in less than half of PIL's time, and how much of a JPEG they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from lora_lightning.utils.libraries import loading

with loading("timm"):
    from timm.data.transforms import RandomResizedCropAndInterpolation

with loading("torchvision"):
    from torchvision.transforms.v2 import functional as F

TENSORS = ("bilinear", "bicubic")  # interpolations that torchvision has for tensors, with antialiasing


class TensorCrop:
    """timm's random crop (Szegedy et al. 2015, arXiv 1409.4842), scaled as a tensor.

    PIL -> (3, height, width), uint8. PIL cuts, torchvision scales: its kernels for uint8 are nearly three
    times as fast as PIL's, and their pixels differ from PIL's by rounding.

    Args:
        crop: draws the places; of one interpolation of TENSORS.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop

    def __call__(self, picture: Image.Image) -> Tensor:
        top, left, height, width = self.crop.get_params(picture, self.crop.scale, self.crop.ratio)
        part = F.pil_to_tensor(picture.crop((left, top, left + width, top + height)))
        return F.resize(part, list(self.crop.size), F.InterpolationMode(_name(self.crop)), antialias=True)


def faster(crop: Any) -> Any:
    """The same crop as a tensor's, where torchvision can do it; else the crop itself."""
    if isinstance(crop, RandomResizedCropAndInterpolation) and _name(crop) in TENSORS:
        return TensorCrop(crop)
    return crop


def least_side(size: Sequence[int], crop_scale: Sequence[float] | None) -> int | None:
    """Pixels of a picture's shorter side that the smallest crop does not have to be scaled up from, about;
    None where a picture is shown whole, as in evaluation.

    Args:
        size: [3, height, width] that the model takes.
        crop_scale: least and greatest share of the area that a crop keeps.
    """
    return None if crop_scale is None else math.ceil(max(size[1:]) / math.sqrt(crop_scale[0]))


def _name(crop: RandomResizedCropAndInterpolation) -> str:
    return str(getattr(crop.interpolation, "value", ""))
