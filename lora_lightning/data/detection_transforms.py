"""Augmentations of images with boxes and masks: torchvision.transforms.v2 in the presets that its own
detectors were trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.utils.libraries import loading

with loading("torchvision"):
    from torchvision import tv_tensors
    from torchvision.transforms import v2

FILL = (124, 116, 104)  # the mean of ImageNet, in which zoomed-out and padded images are set
DETR_SIZES = (400, 500, 600)
DETR_CROPS = (384, 600)


def _flip() -> list[nn.Module]:
    return [v2.RandomHorizontalFlip()]


def _scale_jitter() -> list[nn.Module]:
    """Large-scale jitter (Ghiasi et al. 2020, arXiv 2012.07177): 0.1 to 2 times into 1024 x 1024."""
    size = (1024, 1024)
    return [
        v2.ScaleJitter(target_size=size, antialias=True),
        v2.RandomCrop(size, pad_if_needed=True, fill=_fill()),
        v2.RandomHorizontalFlip(),
    ]


def _multiscale() -> list[nn.Module]:
    """Half of the images cut and enlarged (Carion et al. 2020, DETR, arXiv 2005.12872).

    Resizing alone would be undone by the resizing inside of torchvision's detectors; their own
    multi-scale training is `model.min_size=[640,672,704,736,768,800]`.
    """
    cut = v2.Compose([v2.RandomShortestSize(list(DETR_SIZES), antialias=True), RandomSizeCrop(*DETR_CROPS)])
    return [v2.RandomApply([cut], p=0.5), v2.RandomHorizontalFlip()]


def _ssd() -> list[nn.Module]:
    """Colours, zooming out and IoU crops (Liu et al. 2016, SSD, arXiv 1512.02325)."""
    return [
        v2.RandomPhotometricDistort(),
        v2.RandomZoomOut(fill=_fill()),
        v2.RandomIoUCrop(),
        v2.RandomHorizontalFlip(),
    ]


def _photometric() -> list[nn.Module]:
    return [v2.RandomPhotometricDistort(), v2.RandomHorizontalFlip()]


def _iou_crop() -> list[nn.Module]:
    return [v2.RandomIoUCrop(), v2.RandomHorizontalFlip()]


PRESETS: dict[str, Callable[[], list[nn.Module]]] = {
    "none": list,
    "flip": _flip,
    "scale_jitter": _scale_jitter,
    "multiscale": _multiscale,
    "iou_crop": _iou_crop,
    "photometric": _photometric,
    "ssd": _ssd,
}


class RandomSizeCrop(v2.Transform):
    """A crop of random height and width, each from `least` to `most` pixels or the image's."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])

        def span(size: int) -> tuple[int, int]:
            length = _whole(min(self.least, size), min(self.most, size))
            return _whole(0, size - length), length

        (top, tall), (left, wide) = span(height), span(width)
        return {"top": top, "left": left, "height": tall, "width": wide}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


class DetectionTransform:
    """A preset for an image and its target.

    Training targets come out with boxes inside of the image, of at least one pixel each way, and
    `area` measured anew. Without augmentation nothing is changed.

    Args:
        preset: a key of PRESETS.
    """

    def __init__(self, preset: str = "none") -> None:
        steps = PRESETS[preset]()
        clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_of_each_box)]
        self.steps = v2.Compose([*steps, *clean]) if steps else None

    def __call__(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """An image (3, height, width) of uint8 and its target, plain tensors both in and out."""
        target = dict(target)
        if self.steps is None:
            return image, target
        size = (int(image.shape[-2]), int(image.shape[-1]))
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        if "masks" in target:
            target["masks"] = tv_tensors.Mask(target["masks"])
        image, target = self.steps(tv_tensors.Image(image), target)
        boxes = target["boxes"].as_subclass(Tensor)
        target["boxes"] = boxes
        target["area"] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if "masks" in target:
            target["masks"] = target["masks"].as_subclass(Tensor)
        return image.as_subclass(Tensor), target


def _of_each_box(sample: tuple[Any, Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """What goes when its box goes, beside the masks."""
    return tuple(sample[1][name] for name in ("labels", "iscrowd", "area"))


def _fill() -> dict[type | str, Any]:
    """Colour of the ground for images, nothing for masks."""
    return {tv_tensors.Image: FILL, "others": 0}


def _whole(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))
