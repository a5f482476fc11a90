"""PictureDataModule: what every set of pictures shares, from reading them to the batch on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_lightning.data.augment import AugmentConfig, AugmentOptions
from lora_lightning.data.cropping import enough_for
from lora_lightning.data.decoding import Enough
from lora_lightning.data.findings import DataError
from lora_lightning.data.imbalance import Imbalance, balanced_sampler, class_weights, logit_adjustment
from lora_lightning.data.mixing import mixed
from lora_lightning.data.options import BatchSize, Count, Seed, Workers
from lora_lightning.data.picture_sets import PicturePart, PictureSet, Shown, first_shots
from lora_lightning.data.picture_transform import (
    Facts,
    preprocessing_of,
    unfinished_evaluation_transform,
    unfinished_training_transform,
)
from lora_lightning.data.progressive import Progressive, ProgressiveOptions
from lora_lightning.data.workers import loading_workers
from lora_lightning.errors import ConfigError
from lora_lightning.trainer.loader import ResumableLoader
from lora_lightning.utils.checks import require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import above, at_least, between
from lora_lightning.utils.tables import truncate_list

with loading("timm"):
    from timm.data.random_erasing import RandomErasing

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
Target = Literal["class", "classes", "number"]
Batch = tuple[Tensor, ...]


class PictureDataModule(L.LightningDataModule):
    """Loaders over pictures; a data set says in `read` where they come from, and what its classes are.

    Size, mean, standard deviation and interpolation are those of the model being trained. Workers crop and
    turn, and hand over uint8; float, normalization, erasing, mixup and cutmix happen a batch at a time on the
    device. A batch is images (batch, 3, height, width) and targets, and in training, where the pictures have
    weights, these (batch,). Targets are class indices (batch,); of several classes (batch, classes), 0 or 1;
    or numbers (batch,). Mixup and cutmix make probabilities (batch, classes) of the indices.

    Args:
        batch_size: pictures a batch and process.
        num_workers: loading processes; None takes the cores of this process, at most 8.
        seed: the order and augmentation of training pictures, and every choice of them.
        image_size: height and width in pixels; None takes the model's.
        crop_pct: share of the shorter side that evaluation keeps; None takes the model's.
        augment: `AugmentConfig` of the training pictures, or its options; None takes the set's own default.
        progressive: `Progressive`, or its options, or true: training begins with small pictures.
        shots: train on so many pictures of each class, drawn by `seed`; None takes all.
        imbalance: what is done about classes of unequal sizes: "class_weights" in the loss,
            "balanced_sampler", "logit_adjustment" in the loss, or None.

    Attributes:
        class_names: of class 0 first; set by a subclass, at the latest in `read`.
        target: "class", one class a picture; "classes", any number of them; "number", a number.

    Raises:
        ConfigError: one line for each bad option.
    """

    class_names: list[str]
    target: Target = "class"
    default_augment: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        batch_size: BatchSize = 32,
        num_workers: Workers = None,
        seed: Seed = 0,
        image_size: Annotated[int | None, at_least(8)] = None,
        crop_pct: Annotated[float | None, above(0), between(0, 1)] = None,
        augment: AugmentOptions = None,
        progressive: ProgressiveOptions = None,
        shots: Count | None = None,
        imbalance: Imbalance | None = None,
    ) -> None:
        super().__init__()
        require(PictureDataModule, locals())
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.image_size, self.crop_pct = image_size, crop_pct
        self.augment = AugmentConfig.of(self.default_augment if augment is None else augment)
        self.progressive = Progressive.of(progressive)
        self.shots, self.imbalance = shots, imbalance
        self._parts: dict[Part, PictureSet] = {}
        self._in_use: dict[Part, Shown] = {}
        self._facts: Facts | None = None
        self._constants: dict[tuple[Any, ...], Any] = {}

    def read(self, part: Part) -> PictureSet:
        """The pictures of a part, before any transform; they are read when they are asked for. Sets
        `class_names` and `target` where only the files say them.

        Raises:
            MissingFileError: the data set is not there.
            DataError: it cannot be read at all.
        """
        raise NotImplementedError

    @property
    def provides(self) -> Facts:
        """What model and task need to know, in plain numbers, words and flat lists.

        num_classes, class_names and target; of numbers number_mean and number_std, of the training part;
        where asked for, class_weights or logit_adjustment, a float a class.
        """
        if not hasattr(self, "class_names"):
            self.part("train")
        facts: Facts = {"target": self.target}
        if self.target == "number":
            numbers = self.part("train").targets.double()
            mean, std = float(numbers.mean()), float(numbers.std(unbiased=False))
            return facts | {"num_classes": 1, "number_mean": mean, "number_std": std or 1.0}
        classes = len(self.class_names)
        facts |= {"num_classes": classes, "class_names": list(self.class_names)}
        if self.imbalance == "class_weights":
            facts["class_weights"] = class_weights(self.part("train").targets, classes)
        if self.imbalance == "logit_adjustment":
            facts["logit_adjustment"] = logit_adjustment(self.part("train").targets, classes)
        return facts

    def setup(self, stage: str | None = None) -> None:
        if stage != "test":
            self.part("train"), self.part("val")
        if stage in ("test", None):
            self.part("test")
        if stage in ("fit", None) and self.progressive is not None:
            self.progressive.step_of(self._model())  # which a model of fixed size refuses
            if self.trainer is not None and self.trainer.max_epochs == self.trainer.max_steps == -1:
                problem = "progressive: sizes follow the number of steps, so it must be known. Give "
                raise ConfigError([f"{problem}trainer.max_epochs or trainer.max_steps, or progressive=null."])

    def part(self, part: Part) -> PictureSet:
        """The pictures of a part, read once; of the training part what `shots` leaves."""
        if part not in self._parts:
            pictures = self.read(part)
            self._parts[part] = self._shots(pictures) if part == "train" else pictures
        return self._parts[part]

    def _shots(self, pictures: PictureSet) -> PictureSet:
        options = {"shots": self.shots, "imbalance": self.imbalance}
        if self.target == "number" and any(v is not None for v in options.values()):
            raise ConfigError(
                [
                    f"{n}={v}: numbers have no classes; give {n}=null."
                    for n, v in options.items()
                    if v is not None
                ]
            )
        if self.shots is None:
            return pictures
        if self.target == "classes":
            raise ConfigError([f"shots={self.shots}: a picture has several classes here; give shots=null."])
        kept = first_shots(pictures.targets, self.shots, self.seed)
        return PicturePart(pictures, kept)

    @property
    def train_set(self) -> PictureSet:
        return self.part("train")

    @property
    def val_set(self) -> PictureSet:
        return self.part("val")

    @property
    def test_set(self) -> PictureSet:
        return self.part("test")

    def show(self, part: Part, index: int) -> tuple[str, Image.Image]:
        """Name and picture of a part's sample, as it is on the disk, for reports; a grey one where it cannot
        be read any more, which its name says."""
        pictures = self.part(part)
        try:
            return pictures.name(index), pictures.picture(index)
        except DataError:
            return f"{pictures.name(index)} (cannot be read any more)", Image.new("RGB", (64, 64), "grey")

    def train_dataloader(self) -> DataLoader:
        pictures = self.train_set
        transform = unfinished_training_transform(self.preprocessing(), self.augment)
        shown = self._shown("train", transform, enough_for(transform))
        order = self.training_order(pictures)
        options: dict[str, Any] = {"shuffle": True} if order is None else {"sampler": order}
        processes = 1 if self.trainer is None else self.trainer.world_size
        full = len(pictures) // processes >= self.batch_size  # else the only batch would be dropped
        return self._loader(shown, ResumableLoader, drop_last=full, seed=self.seed, **options)

    def training_order(self, pictures: PictureSet) -> Sampler[int] | None:
        """In which order training pictures come, None for every one once, shuffled."""
        if self.imbalance == "balanced_sampler":
            return balanced_sampler(pictures.targets, len(self.class_names))
        return None

    def val_dataloader(self) -> DataLoader:
        return self._loader(self._shown("val", unfinished_evaluation_transform(self.preprocessing())))

    def test_dataloader(self) -> DataLoader:
        return self._loader(self._shown("test", unfinished_evaluation_transform(self.preprocessing())))

    def _shown(
        self, part: Part, transform: Callable[[Image.Image], Tensor], enough: Enough | None = None
    ) -> Shown:
        self._in_use[part] = Shown(self.part(part), transform, enough)
        return self._in_use[part]

    def teardown(self, stage: str) -> None:
        """Say how many pictures could not be read, though they could be when the data were checked."""
        for part, shown in self._in_use.items():
            if lost := shown.lost.nonzero().flatten().tolist():
                names = truncate_list([shown.pictures.name(place) for place in lost])
                told = f"{len(lost):,} of {len(shown):,} {part} pictures could not be read: {names}."
                tell(f"{told} Others took their places.")
        self._in_use.clear()

    def _loader(
        self, pictures: Dataset[Any], make: Callable[..., DataLoader] = DataLoader, **options: Any
    ) -> DataLoader:
        workers = loading_workers(self.num_workers, self.trainer)
        return make(
            pictures,
            batch_size=self.batch_size,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            **options,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, targets, *weights = batch
        training = self.trainer is not None and bool(self.trainer.training)
        return self.finish(images, targets, training, *weights)

    def finish(self, images: Tensor, targets: Tensor, training: bool, weights: Tensor | None = None) -> Batch:
        """The part of the preprocessing that is done a batch at a time, on the batch's device.

        Args:
            images: (batch, 3, height, width), uint8.
            targets: as they are in the data set.
            training: also erase, mix, and make smaller.
            weights: (batch,), or None.

        Returns:
            Normalized images of the precision in use; targets, probabilities (batch, classes) where they were
            mixed; weights, in training alone and where there are any.
        """
        mean, std = self._mean_std(images.device)
        images = images.float().sub_(mean).div_(std)
        if training:
            images = self._resized(images)
            if self.augment.random_erasing > 0:
                erase = RandomErasing(self.augment.random_erasing, mode="pixel", device=images.device)
                images = erase(images)
            images, targets, weights = self._mixed(images, targets, weights)
        if self.trainer is not None:
            images = self.trainer.precision_plugin.convert_input(images)
        return (images, targets) if weights is None or not training else (images, targets, weights)

    def _mixed(
        self, images: Tensor, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        augment = self.augment
        if not (augment.mixup or augment.cutmix) or bool(torch.rand(()) >= augment.mix_prob):
            return images, targets, weights
        if self.target == "class":
            targets = F.one_hot(targets, len(self.class_names))
        return mixed(images, targets.float(), weights, augment.mixup, augment.cutmix)

    def _resized(self, images: Tensor) -> Tensor:
        if self.progressive is None or self.trainer is None:
            return images
        done = self.trainer.global_step / max(float(self.trainer.estimated_stepping_batches), 1.0)
        step = self.progressive.step_of(self._model())
        height, width = (self.progressive.size(side, done, step) for side in images.shape[-2:])
        if (height, width) == tuple(images.shape[-2:]):
            return images
        return F.interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)

    def preprocessing(self) -> Facts:
        """What evaluation does to a picture, as `preprocessing_of` says it of the model being trained; the
        last one's where there is no Trainer, ImageNet's where there never was one."""
        model = self._model()
        if model is not None or self._facts is None:
            facts = preprocessing_of(model, self.image_size, self.crop_pct)
            if model is None:
                return facts
            self._facts = facts
        return self._facts

    def _model(self) -> nn.Module | None:
        return None if self.trainer is None else self.trainer.lightning_module

    def _mean_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """In units of 0 to 255, (3, 1, 1) each; copied to a device once, not once a batch."""
        facts = self.preprocessing()
        key = (device, *facts["mean"], *facts["std"])
        if key not in self._constants:
            both = torch.tensor([facts["mean"], facts["std"]], device=device) * 255
            self._constants[key] = both.view(2, 3, 1, 1).unbind()
        return self._constants[key]


@rank_zero_only
def tell(text: str) -> None:
    """Print on rank zero, once a process, though several trainings of one program may use the data."""
    if text not in _TOLD:
        _TOLD.add(text)
        print(text, flush=True)


_TOLD: set[str] = set()
