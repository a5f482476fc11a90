"""CIFARDataModule: CIFAR-10 and CIFAR-100 at the size a pretrained vision model expects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning.data.cifar_files import bad_files, download_files, require_files
from lora_lightning.data.images import ImageArrays, stratified_split
from lora_lightning.data.options import BatchSize, Folder, Seed, Workers
from lora_lightning.data.workers import loading_workers
from lora_lightning.errors import ConfigError
from lora_lightning.trainer.loader import ResumableLoader
from lora_lightning.utils.checks import require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import Check, above, at_least, between, listed, number

with loading("timm"):
    import timm.data
    from timm.data.random_erasing import RandomErasing

with loading("torchvision"):
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.transforms import v2

DATASETS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
CLASSES = {"cifar10": 10, "cifar100": 100}
TRAINING = 50_000  # images
POLICIES = ("rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "v0")
PROBABILITY = between(0, 1, noun="a probability")
ALPHA = at_least(0, note="0.8 or 1 are usual, 0 switches it off")
SHARES = listed(
    "two shares of the area, 0 < least <= greatest <= 1: [0.7, 1]",
    number(above(0), between(0, 1)),
    count=2,
    ascending=True,
)


def _is_policy(value: Any) -> bool:
    try:
        timm.data.create_transform(32, is_training=True, auto_augment=value or "?")
    except Exception:  # timm checks the text by assertions and conversions
        return False
    return True


POLICY = Check(f"a policy of timm, such as {', '.join(POLICIES)}", _is_policy, POLICIES)


class CIFARDataModule(L.LightningDataModule):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) for fine-tuning: 50,000 training, 10,000 test images.

    Size, mean, standard deviation and interpolation are those of the timm model being trained.
    Workers crop, resize and flip, and hand over uint8; float, normalization, erasing, mixup and
    cutmix happen a batch at a time on the device. Batches are images (batch, 3, height, width) and
    labels (batch,), or (batch, classes) probabilities when training with mixup or cutmix.

    Args:
        name: "cifar10" or "cifar100".
        root: the folder that holds `cifar-10-batches-py` or `cifar-100-python`.
        download: fetch the files into `root` if they are not there.
        batch_size: images a batch and process.
        num_workers: loading processes; None takes the cores of this process, at most 8.
        val_size: training images set aside for validation, in equal shares of each class.
        seed: the validation split, and the order and augmentation of training images.
        image_size: height and width in pixels; None takes the model's.
        crop_scale: least and greatest share of the area that a training crop keeps.
        hflip: probability of mirroring a training image.
        auto_augment: a policy of timm, such as "rand-m9-mstd0.5-inc1" (RandAugment), or None.
        random_erasing: probability of erasing a rectangle (Zhong et al. 2017, arXiv 1708.04896).
        mixup: alpha of mixup (Zhang et al. 2017, arXiv 1710.09412); 0 switches it off.
        cutmix: alpha of cutmix (Yun et al. 2019, arXiv 1905.04899); 0 switches it off. With both
            on, each batch takes one of them.
        mix_prob: probability that a batch is mixed at all.

    Attributes:
        classes: the names of the classes, after setup.

    Raises:
        ConfigError: one line for each bad option.
        MissingFileError: the files are not there, not whole, or cannot be downloaded.
    """

    def __init__(
        self,
        name: Literal["cifar10", "cifar100"] = "cifar10",
        root: Folder = "data",
        download: bool = False,
        batch_size: BatchSize = 128,
        num_workers: Workers = None,
        val_size: Annotated[int, between(1, TRAINING - 1)] = 5000,
        seed: Seed = 0,
        image_size: Annotated[int | None, at_least(8)] = None,
        # ImageNet's (0.08, 1) would cut scraps of a few pixels out of a 32 x 32 image.
        crop_scale: Annotated[Sequence[float], SHARES] = (0.7, 1.0),
        hflip: Annotated[float, PROBABILITY] = 0.5,
        auto_augment: Annotated[str | None, POLICY] = None,
        random_erasing: Annotated[float, PROBABILITY] = 0.0,
        mixup: Annotated[float, ALPHA] = 0.8,
        cutmix: Annotated[float, ALPHA] = 1.0,
        mix_prob: Annotated[float, PROBABILITY] = 1.0,
    ) -> None:
        super().__init__()
        require(CIFARDataModule, locals())
        self.dataset = DATASETS[name]
        self.provides = {"num_classes": CLASSES[name]}
        self.root = Path(root).expanduser().absolute()
        self.download = download
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_size = val_size
        self.seed = seed
        self.image_size = image_size
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        self.hflip = hflip
        self.auto_augment = auto_augment
        self.erasing_probability = random_erasing
        self.classes: list[str] = []
        self._constants: dict[tuple[Any, ...], Any] = {}
        mixes = [
            mix(alpha=float(alpha), num_classes=CLASSES[name])
            for mix, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha > 0
        ]
        self.mix = v2.RandomApply([v2.RandomChoice(mixes)], p=mix_prob) if mixes else None

    def prepare_data(self) -> None:
        if self.download and bad_files(self.dataset, self.root):
            download_files(self.dataset, self.root)
        require_files(self.dataset, self.root)

    def setup(self, stage: str | None = None) -> None:
        require_files(self.dataset, self.root)
        if stage != "test" and not hasattr(self, "train_images"):
            whole = self.dataset(str(self.root), train=True)
            labels = torch.tensor(whole.targets)
            train, val = stratified_split(labels, self.val_size, self.seed)
            self._check_sizes(len(labels), len(train))
            self.train_images = whole.data[train.numpy()], labels[train]
            self.val_images = whole.data[val.numpy()], labels[val]
            self.classes = whole.classes
        if stage in ("test", None) and not hasattr(self, "test_images"):
            test = self.dataset(str(self.root), train=False)
            self.test_images = test.data, torch.tensor(test.targets)
            self.classes = test.classes

    def train_dataloader(self) -> DataLoader:
        transform = self._transform(training=True)
        images = ImageArrays(*self.train_images, transform)
        return self._loader(images, ResumableLoader, shuffle=True, drop_last=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        return self._loader(ImageArrays(*self.val_images, self._transform(training=False)))

    def test_dataloader(self) -> DataLoader:
        return self._loader(ImageArrays(*self.test_images, self._transform(training=False)))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        return self.finish(images, labels, training)

    def finish(self, images: Tensor, labels: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """The part of the preprocessing that is done a batch at a time, on the batch's device.

        Args:
            images: (batch, 3, height, width), uint8.
            labels: (batch,), class indices.
            training: also erase and mix.

        Returns:
            Normalized images of the precision in use; labels (batch,) or (batch, classes).
        """
        mean, std = self._mean_std(images.device)
        images = images.float().sub_(mean).div_(std)
        if training and self.erasing_probability > 0:
            erase = RandomErasing(self.erasing_probability, mode="pixel", device=images.device)
            images = erase(images)
        if training and self.mix is not None:
            images, labels = self.mix(images, labels)
        if self.trainer is not None:
            images = self.trainer.precision_plugin.convert_input(images)
        return images, labels

    def data_config(self) -> dict[str, Any]:
        """timm's data config of the model being trained; ImageNet's without a Trainer."""
        module = None if self.trainer is None else self.trainer.lightning_module
        modules = [] if module is None else module.modules()
        model = next((m for m in modules if hasattr(m, "pretrained_cfg")), nn.Identity())
        size = self.image_size and (self.image_size, self.image_size)
        embed = getattr(model, "patch_embed", None)
        built = getattr(embed, "img_size", None)
        flexible = getattr(model, "dynamic_img_size", False) or not getattr(embed, "strict_img_size", True)
        if size and built and not flexible and tuple(built) != size:
            raise ConfigError(
                [
                    f"image_size={self.image_size}: {type(model).__name__} takes "
                    f"{built[0]} x {built[1]}; give image_size=null, or build the model with "
                    f"img_size={self.image_size}."
                ]
            )
        size = size or built
        args = {"input_size": (3, *size)} if size else {}
        return timm.data.resolve_data_config(args, model=model)

    def _mean_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """In units of 0 to 255, (3, 1, 1) each; copied to a device once, not once a batch."""
        config = self.data_config()
        key = (device, *config["mean"], *config["std"])
        if key not in self._constants:
            both = torch.tensor([config["mean"], config["std"]], device=device) * 255
            self._constants[key] = both.view(2, 3, 1, 1).unbind()
        return self._constants[key]

    def _transform(self, training: bool) -> Callable[[Image.Image], Tensor]:
        config = self.data_config()
        options: dict[str, Any] = {
            "input_size": config["input_size"],
            "interpolation": config["interpolation"],
            "mean": config["mean"],
            "use_prefetcher": True,
        }
        if training:
            options |= {
                "is_training": True,
                "scale": self.crop_scale,
                "hflip": self.hflip,
                "color_jitter": None,
                "auto_augment": self.auto_augment,
            }
        else:
            # The object fills a CIFAR image: resize the whole of it, cut nothing off.
            options["crop_pct"] = 1.0
        return timm.data.create_transform(**options)

    def _loader(
        self, images: ImageArrays, make: Callable[..., DataLoader] = DataLoader, **options: Any
    ) -> DataLoader:
        workers = loading_workers(self.num_workers, self.trainer)
        return make(
            images,
            batch_size=self.batch_size,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            **options,
        )

    def _check_sizes(self, total: int, train: int) -> None:
        processes = 1 if self.trainer is None else self.trainer.world_size
        problems = []
        if train <= 0:
            problems.append(
                f"val_size={self.val_size}: there are {total} training images; give fewer, so that "
                "some are left to train on."
            )
        elif train // processes < self.batch_size:
            problems.append(
                f"batch_size={self.batch_size}: {train // processes} training images a process do "
                "not fill one batch; give fewer."
            )
        if problems:
            raise ConfigError(problems)
