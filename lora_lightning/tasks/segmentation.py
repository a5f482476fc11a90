"""SemanticSegmenter: trains models that give every pixel a class, and scores them by mean IoU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor, nn

from lora_lightning.data.mask_pictures import class_colours
from lora_lightning.errors import ConfigError
from lora_lightning.planning.heads import find_heads
from lora_lightning.tasks.confusion import Confusions, Segmentation, named_ious
from lora_lightning.tasks.examples import Kept
from lora_lightning.tasks.optim import configured
from lora_lightning.tasks.optim_config import OptimConfig, OptimOptions
from lora_lightning.tasks.reporting import BEFORE, EXAMPLES, Reporting
from lora_lightning.tasks.scores import Score
from lora_lightning.tasks.segmentation_examples import examples_of
from lora_lightning.tasks.segmentation_maps import class_maps, dice_loss, logits_of, pixel_loss
from lora_lightning.tasks.segmentation_pictures import Example as Seen
from lora_lightning.tasks.segmentation_pictures import log_to_wandb, tables_of
from lora_lightning.tasks.segmentation_report import write_report
from lora_lightning.trainer.trackers.choice import tracker_of
from lora_lightning.trainer.trackers.tracker import Confusion, Example
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import TEXT, at_least, is_whole, listed, whole

TrainingBatch = tuple[Tensor, Tensor, Tensor]
Batch = tuple[list[Tensor], list[Tensor], list[int]]
LOGGED_PICTURES = 8
PALETTE = listed("three numbers from 0 to 255 for each class", whole(at_least(0, below=256)))


class SemanticSegmenter(Reporting, L.LightningModule):
    """Trains `model` on pictures and masks, in which 255 is no class.

    A training batch is pictures (batch, 3, height, width), normalized, masks (batch, height, width) and the
    pictures' places in their part; one of evaluation has them as lists, since pictures differ in size there,
    and masks are of the full size, at which the model's logits are scored.

    Logs train/loss and, of a model with an auxiliary head, train/aux; val/miou and val/acc, the share of
    pixels that are right, and the same under test/, there also test/iou/CLASS. All are fractions in [0, 1],
    of the pixels of the whole part. With a WandbLogger the first validation pictures are logged with their
    masks.

    Args:
        model: pictures -> logits (batch, num_classes, height, width), or a dict of them as `out` and perhaps
            `aux`, as torchvision's segmentation models give them.
        num_classes: how many classes there are.
        class_names: their names, that of index 0 first; None numbers them.
        palette: red, green and blue of each class, in pictures; None takes colours that differ.
        optim: the optimizer's options, also as a plain mapping; None takes the defaults. `head_lr` is the
            rate of the layers that are new.
        aux_weight: of the auxiliary head's loss; 0.5 is that of torchvision's references.
        dice_weight: of the Dice loss beside cross entropy, for classes of few pixels; 0 leaves it out.
        test_flips: average the logits of each picture and of its mirror image in validation and test.

    Raises:
        ConfigError: one line for each bad option.
    """

    scores = (Score("miou", "mIoU %"), Score("acc", "pixel accuracy %"))

    def __init__(
        self,
        model: nn.Module,
        num_classes: Annotated[int, at_least(2)],
        class_names: Annotated[Sequence[str] | None, listed("a list of names", TEXT)] = None,
        palette: Annotated[Sequence[int] | None, PALETTE] = None,
        optim: OptimOptions = None,
        aux_weight: Annotated[float, at_least(0)] = 0.5,
        dice_weight: Annotated[float, at_least(0)] = 0.0,
        test_flips: bool = False,
    ) -> None:
        super().__init__()
        require(SemanticSegmenter, locals(), _apart(num_classes, class_names, palette))
        self.model = model
        self.optim = OptimConfig.of(optim)
        self.class_names = list(class_names or map(str, range(num_classes)))
        self.colours = class_colours(self.class_names, palette)
        self.aux_weight, self.dice_weight, self.test_flips = aux_weight, dice_weight, test_flips
        # Plain types, so that the checkpoint loads with weights_only=True.
        self.save_hyperparameters(
            {
                "num_classes": num_classes,
                "class_names": self.class_names,
                "palette": None if palette is None else list(palette),
                "optim": self.optim.to_dict(),
                "aux_weight": aux_weight,
                "dice_weight": dice_weight,
                "test_flips": test_flips,
            }
        )
        self._counted = Confusions(num_classes)
        self._counted_off = Confusions(num_classes)
        self._tested: dict[str, Segmentation] = {}
        self._kept: Kept[Seen] = Kept(EXAMPLES, EXAMPLES)
        self._pictures: list[tuple[Image.Image, Tensor, Tensor]] = []

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (batch, num_classes, height, width)."""
        return logits_of(self.model(pictures))

    def predicted(self, pictures: list[Tensor], sizes: list[Any]) -> list[Tensor]:
        """The class of every pixel of each picture, (height, width) of the sizes, uint8."""
        return class_maps(self.model, pictures, sizes, self.test_flips)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        pictures, masks, _ = batch
        truth = masks.long()
        outputs = self._outputs(pictures)
        loss = self._loss(logits_of(outputs), truth)
        if isinstance(outputs, Mapping) and "aux" in outputs:  # with a weight of 0 too: DDP needs it used
            aux = self._loss(outputs["aux"], truth)
            self.log("train/aux", aux.detach())
            loss = loss + self.aux_weight * aux
        self.log("train/loss", loss)
        return loss

    def _outputs(self, pictures: Tensor) -> Any:
        try:
            return self.model(pictures)
        except ValueError as error:
            if len(pictures) > 1 or "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError([
                "data.batch_size=1: the head pools each picture to one value a channel, of which its "
                "BatchNorm cannot take a variance: give at least 2."
            ]) from None  # fmt: skip

    def _loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        loss = pixel_loss(logits, truth)
        return loss + self.dice_weight * dice_loss(logits, truth) if self.dice_weight else loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        found = self._count(batch, self._counted)
        if self._wandb() and (room := LOGGED_PICTURES - len(self._pictures)) > 0:
            _, masks, places = batch
            for place, truth, one in list(zip(places, masks, found, strict=True))[:room]:
                picture = self.trainer.datamodule.show("val", place)[1]  # type: ignore[attr-defined]  # as MasksDataModule
                self._pictures.append((picture, truth.cpu(), one.cpu()))

    def on_test_start(self) -> None:
        self._kept = Kept(self.kept_examples, EXAMPLES)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        found = {self.now: self._count(batch, self._counted)}
        if self._tests_before():
            with self.as_before():
                found = {BEFORE: self._count(batch, self._counted_off), **found}
        if self.pictured and self.trainer.is_global_zero:
            self._keep(batch, found)

    def _keep(self, batch: Batch, found: Mapping[str, list[Tensor]]) -> None:
        """What the page may show."""
        _, masks, places = batch
        for i, place in enumerate(map(int, places)):
            maps = {state: each[i] for state, each in found.items()}
            self._kept.add(-self._counted.picture_miou(place), partial(_seen, place, masks[i], maps))

    def _tests_before(self) -> bool:
        return self.pictured and self.has_before()

    def _count(self, batch: Batch, counted: Confusions) -> list[Tensor]:
        pictures, masks, places = batch
        found = self.predicted(pictures, [mask.shape for mask in masks])
        for place, one, truth in zip(places, found, masks, strict=True):
            counted.add(int(place), one, truth)
        return found

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")
        for logger in self._wandb():
            pictures = self._pictures[: tracker_of(logger).allowed.examples]
            log_to_wandb(logger, "val/predictions", pictures, self.class_names)
        self._pictures.clear()

    def on_test_epoch_end(self) -> None:
        before = {BEFORE: self._counted_off.all()} if self._tests_before() else {}
        self._counted_off.reset()
        self._tested = {**before, self.now: self._log_scores("test")}
        matrix = self._tested[self.now].matrix()
        self.log_dict(
            {f"test/{n}": v for n, v in named_ious(matrix, self.class_names).items()}, sync_dist=True
        )

    def _log_scores(self, stage: str) -> Segmentation:
        """Every process has gathered the same."""
        judged = self._counted.all()
        self._counted.reset()
        for name, value in judged.scores().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "miou", sync_dist=True)
        return judged

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of the last test's scores, by the bootstrap over pictures."""
        return self._tested[self.now].intervals() if self._tested else {}

    def before(self) -> dict[str, Any]:
        """Scores and intervals of the same test before training, for the head of the run's page; empty where
        nobody knows them."""
        base = self._tested.get(BEFORE)
        return {} if base is None else {"scores": base.scores(), "intervals": base.intervals()}

    def tables(self) -> dict[str, Any]:
        """Of the last test, for loggers and the command line: header and rows of the classes, and of those
        that are taken for each other."""
        return tables_of(self._tested[self.now], self.class_names) if self._tested else {}

    def confusion(self) -> Confusion | None:
        """What the pixels of the last test were taken for, for trackers."""
        if not self._tested:
            return None
        return Confusion(self.class_names, self._tested[self.now].matrix().tolist())

    def report(self, data: L.LightningDataModule, folder: str | os.PathLike[str]) -> list[str]:
        """Pictures of the last test in `folder`: contact_sheet.png and report.html, where each picture has
        the truth beside what was found before (if the model is adapted) and after training.

        Returns:
            Lines to print; none before a test.
        """
        if not (self._tested and self._kept.count):
            return []
        return write_report(self._kept, self._tested, data, self.class_names, self.colours, Path(folder))

    def examples(self, data: L.LightningDataModule, most: int) -> list[Example]:
        """The last test's first pictures, as many as were kept, with the truth and what was found before (if
        the model is adapted) and after."""
        return examples_of(self._kept.first[:most], data, self.colours)

    def _wandb(self) -> list[WandbLogger]:
        if not self.trainer.is_global_zero or self.trainer.sanity_checking:
            return []
        if not hasattr(getattr(self.trainer, "datamodule", None), "show"):
            return []
        return [
            logger
            for logger in self.trainer.loggers
            if isinstance(logger, WandbLogger) and tracker_of(logger).allowed.examples
        ]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        layers = [self.model.get_submodule(name) for name in find_heads(self.model)]
        return configured(self, {p for layer in layers for p in layer.parameters()}, self.optim)


def _seen(place: int, truth: Tensor, maps: Mapping[str, Tensor]) -> Seen:
    return Seen(place, truth.cpu().numpy(), {state: one.cpu().numpy() for state, one in maps.items()})


def _apart(num_classes: Any, class_names: Any, palette: Any) -> list[str]:
    """What is wrong in options taken together."""
    found: list[str] = []
    if not is_whole(num_classes):
        return found
    if isinstance(class_names, Sequence) and len(class_names) != num_classes:
        found.append(
            f"class_names={list(class_names)!r}: {len(class_names)} names for num_classes={num_classes}: "
            "give as many."
        )
    if isinstance(palette, Sequence) and len(palette) != 3 * num_classes:
        found.append(
            f"palette: {len(palette)} numbers for num_classes={num_classes}: give three for each class."
        )
    return found
