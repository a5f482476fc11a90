"""Random crops of training pictures: faster than PIL's, and of JPEGs decoded as far as they need."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_lightning.data.decoding import Enough
from lora_lightning.utils.libraries import loading

with loading("timm"):
    from timm.data.transforms import RandomResizedCropAndInterpolation

with loading("torchvision"):
    from torchvision.transforms.v2 import functional as F

TENSORS = ("bilinear", "bicubic")  # interpolations that torchvision has for tensors, with antialiasing


class TensorCrop:
    """timm's random crop (Szegedy et al. 2015, arXiv 1409.4842), scaled as a tensor.

    PIL -> (3, height, width), uint8. PIL cuts, torchvision scales: its kernels for uint8 are nearly three
    times as fast as PIL's, and their pixels differ from PIL's by rounding. The crop may be drawn before its
    picture is decoded, which then need not be decoded whole.

    Args:
        crop: draws the places; of one interpolation of TENSORS.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop
        self._drawn: tuple[float, ...] | None = None  # of the next picture, in shares of its width and height

    def draw(self, width: int, height: int) -> int:
        """Draw the next picture's crop; how many pixels of the picture's shorter side are enough for it."""
        size = torch.empty((3, height, width), device="meta")  # the crop's place follows from it alone
        y, x, h, w = self.crop.get_params(size, self.crop.scale, self.crop.ratio)
        self._drawn = x / width, y / height, (x + w) / width, (y + h) / height
        by = max(self.crop.size[0] / h, self.crop.size[1] / w)
        return math.ceil(min(width, height) * by)

    def __call__(self, picture: Image.Image) -> Tensor:
        if self._drawn is None:
            self.draw(*picture.size)
        drawn, self._drawn = self._drawn or (0, 0, 1, 1), None
        sides = picture.size * 2
        left, top, right, bottom = (round(share * side) for share, side in zip(drawn, sides, strict=True))
        part = picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
        size, interpolation = list(self.crop.size), F.InterpolationMode(_name(self.crop))
        return F.resize(F.pil_to_tensor(part), size, interpolation, antialias=True)


def faster(crop: Any) -> Any:
    """The same crop as a tensor's, where torchvision can do it; else the crop itself."""
    if isinstance(crop, RandomResizedCropAndInterpolation) and _name(crop) in TENSORS:
        return TensorCrop(crop)
    return crop


def enough_for(transform: Any) -> Enough | None:
    """What a training transform needs of a picture, asked before it is decoded: of its crop's pixels as many
    as the model takes. None where a picture is shown whole, as in evaluation, or PIL scales it."""
    first = transform.transforms[0]
    return first.draw if isinstance(first, TensorCrop) else None


def _name(crop: RandomResizedCropAndInterpolation) -> str:
    return str(getattr(crop.interpolation, "value", ""))
