"""CIFARDataModule: CIFAR-10 and CIFAR-100 at the size a pretrained vision model expects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_lightning.data.cifar_files import bad_files, download_files, require_files
from lora_lightning.data.options import Folder
from lora_lightning.data.picture_sets import PicturePart, PictureSet, stratified_split
from lora_lightning.data.pictures import Part, PictureDataModule
from lora_lightning.errors import ConfigError
from lora_lightning.utils.checks import options_of, require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import between

with loading("torchvision"):
    from torchvision.datasets import CIFAR10, CIFAR100

DATASETS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
TRAINING = 50_000  # images


class ImageArrays(PictureSet):
    """Arrays (n, 32, 32, 3), uint8, and their classes (n,)."""

    def __init__(self, data: np.ndarray, targets: Tensor) -> None:
        self.data, self.targets = data, targets

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(self.data[index])


class CIFARDataModule(PictureDataModule):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) for fine-tuning: 50,000 training, 10,000 test images.

    Evaluation shows whole images: the object fills them.

    Args:
        name: "cifar10" or "cifar100".
        root: the folder that holds `cifar-10-batches-py` or `cifar-100-python`.
        download: fetch the files into `root` if they are not there.
        val_size: training images set aside for validation, in equal shares of each class.
        **options: of `PictureDataModule`; without `augment`, crops of 0.7 to 1 of an image, mirrored, mixup
            of 0.8 and cutmix of 1.

    Raises:
        ConfigError: one line for each bad option.
        MissingFileError: the files are not there, not whole, or cannot be downloaded.
    """

    # ImageNet's (0.08, 1) would cut scraps of a few pixels out of a 32 x 32 image.
    default_augment: ClassVar[dict[str, Any]] = {"crop_scale": (0.7, 1.0), "mixup": 0.8, "cutmix": 1.0}

    @options_of(PictureDataModule)
    def __init__(
        self,
        name: Literal["cifar10", "cifar100"] = "cifar10",
        root: Folder = "data",
        download: bool = False,
        val_size: Annotated[int, between(1, TRAINING - 1)] = 5000,
        **options: Any,
    ) -> None:
        require(CIFARDataModule, {**locals(), **options})
        super().__init__(**{"batch_size": 128, "crop_pct": 1.0, **options})
        self.dataset = DATASETS[name]
        self.root = Path(root).expanduser().absolute()
        self.download = download
        self.val_size = val_size
        self._whole: dict[bool, ImageArrays] = {}

    def prepare_data(self) -> None:
        if self.download and bad_files(self.dataset, self.root):
            download_files(self.dataset, self.root)
        require_files(self.dataset, self.root)

    def read(self, part: Part) -> PictureSet:
        whole = self._arrays(training=part != "test")
        if part == "test":
            return whole
        if self.val_size >= len(whole):
            raise ConfigError(
                [
                    f"val_size={self.val_size}: there are {len(whole)} training images; give fewer, so that "
                    "some are left to train on."
                ]
            )
        train, val = stratified_split(whole.targets, self.val_size, self.seed)
        return PicturePart(whole, train if part == "train" else val)

    def _arrays(self, training: bool) -> ImageArrays:
        if training not in self._whole:
            require_files(self.dataset, self.root)
            read = self.dataset(str(self.root), train=training)
            self.class_names = list(read.classes)
            self._whole[training] = ImageArrays(read.data, torch.tensor(read.targets))
        return self._whole[training]
