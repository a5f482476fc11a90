"""Crops scaled as tensors against timm's by PIL; JPEGs decoded at as little as a crop needs."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lora_lightning.data import decoding
from lora_lightning.data.augment import AugmentConfig
from lora_lightning.data.cropping import TensorCrop, faster
from lora_lightning.data.decoding import Enough, read_picture
from lora_lightning.data.picture_sets import PictureSet
from lora_lightning.data.picture_transform import preprocessing_of, unfinished_training_transform
from lora_lightning.data.pictures import PictureDataModule


def waves(width: int, height: int) -> Image.Image:
    """A smooth picture, alike at every scale."""
    x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    return Image.fromarray((127 + 120 * np.sin(np.stack((x, y, x + y), -1))).astype(np.uint8))


def jpeg(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(300, 200), (20, 30)])
def test_a_crop_is_that_of_timm_but_for_rounding(interpolation, size):
    crop = RandomResizedCropAndInterpolation(32, scale=(0.3, 1.0), interpolation=interpolation)
    ours = faster(crop)
    assert isinstance(ours, TensorCrop)
    for seed in range(5):
        random.seed(seed)
        theirs = F.pil_to_tensor(crop(waves(*size)))
        random.seed(seed)
        mine = ours(waves(*size))
        assert mine.shape == (3, 32, 32) and mine.dtype == torch.uint8
        assert int((mine.int() - theirs.int()).abs().max()) <= 2


def test_interpolations_that_torchvision_lacks_stay_timms():
    for name in ("lanczos", "random"):
        crop = RandomResizedCropAndInterpolation(32, interpolation=name)
        assert faster(crop) is crop


def test_a_crop_drawn_before_is_the_one_that_is_taken():
    """Of a picture decoded at a half as of the whole one, but for half a pixel."""
    crop = TensorCrop(RandomResizedCropAndInterpolation(32, scale=(0.1, 1.0), interpolation="bicubic"))
    for seed in range(5):
        random.seed(seed)
        at_once, after = crop(waves(800, 600)), random.getstate()
        random.seed(seed)
        assert 32 <= crop.draw(800, 600) <= 32 / 0.1
        assert random.getstate() == after
        later = crop(waves(400, 300))
        assert random.getstate() == after
        assert float((later.float() - at_once.float()).abs().mean()) < 3


@pytest.mark.parametrize(("least", "side"), [(None, 800), (500, 800), (400, 400), (150, 200), (1, 100)])
def test_a_jpeg_is_decoded_at_whole_steps_that_are_enough(least, side):
    file = jpeg(waves(1200, 800))
    found = read_picture(file, least and (lambda *size: least))
    assert found.size == (side * 3 // 2, side)
    exact = np.asarray(waves(1200, 800).resize(found.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(found).astype(int) - exact).mean() < 2


def test_other_formats_and_marks_are_as_they_were():
    png = io.BytesIO()
    waves(300, 200).save(png, "PNG")
    assert read_picture(png.getvalue(), lambda *size: 10).size == (300, 200)
    exif = Image.Exif()
    exif[decoding.ROTATED] = 6
    asked = []
    upright = read_picture(jpeg(waves(800, 400), exif=exif), lambda *size: asked.append(size) or 100)
    assert upright.size == (100, 200) and asked == [(400, 800)]
    assert read_picture(jpeg(waves(800, 400).convert("CMYK")), lambda *size: 100).mode == "RGB"
    assert read_picture(jpeg(waves(800, 400).convert("L")), lambda *size: 100).size == (200, 100)


@pytest.mark.parametrize("policy", [None, "trivialaugment", "rand-m9-mstd0.5-inc1"])
def test_policies_follow_the_crop(policy):
    augment = AugmentConfig(auto_augment=policy, color_jitter=0.2, vflip=0.5)
    transform = unfinished_training_transform(preprocessing_of(None, 32), augment)
    image = transform(waves(90, 60))
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8


class Photographs(PictureSet):
    """One photograph, which notes how it is asked for."""

    def __init__(self) -> None:
        self.targets = torch.zeros(4, dtype=torch.int64)
        self.asked: list[bool] = []
        self.file = jpeg(waves(600, 400))

    def picture(self, index: int, enough: Enough | None = None) -> Image.Image:
        self.asked.append(enough is not None)
        return read_picture(self.file, enough)


def test_training_alone_takes_scaled_photographs():
    class Data(PictureDataModule):
        class_names = ["a", "b"]

        def read(self, part: str) -> PictureSet:
            return Photographs()

    data = Data(batch_size=2, num_workers=0, image_size=32, augment={"crop_scale": (0.25, 1.0)})
    assert next(iter(data.train_dataloader()))[0].shape == (2, 3, 32, 32)
    assert isinstance(next(iter(data.val_dataloader()))[0], Tensor)
    assert set(data.train_set.asked) == {True} and set(data.val_set.asked) == {False}
    assert data.show("train", 0)[1].size == (600, 400)
