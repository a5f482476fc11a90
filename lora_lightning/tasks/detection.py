"""ObjectDetector: trains detectors of torchvision's convention, and scores them as COCO does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.planning.heads import find_heads
from lora_lightning.tasks.average_precision import AveragePrecision, scores_of
from lora_lightning.tasks.detection_confusion import BACKGROUND, Detections, detections_of
from lora_lightning.tasks.detection_examples import examples_of
from lora_lightning.tasks.detection_pictures import log_to_wandb
from lora_lightning.tasks.detection_report import Findings, write_report
from lora_lightning.tasks.optim import configured
from lora_lightning.tasks.optim_config import OptimConfig, OptimOptions
from lora_lightning.tasks.reporting import BEFORE, Reporting
from lora_lightning.tasks.scores import Score
from lora_lightning.trainer.trackers.choice import tracker_of
from lora_lightning.trainer.trackers.tracker import Confusion, Example
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import TEXT, above, at_least, between, is_number, is_whole, listed

Batch = tuple[list[Tensor], list[dict[str, Any]]]
LOGGED_PICTURES = 8

SCORES = (
    Score("map", "mAP", 100),
    Score("map_50", "AP50", 100),
    Score("map_small", "AP small", 100),
    Score("map_medium", "AP medium", 100),
    Score("map_large", "AP large", 100),
)
MASK_SCORES = (Score("mask_map", "mask mAP", 100), Score("mask_map_50", "mask AP50", 100))


class ObjectDetector(Reporting, L.LightningModule):
    """Trains `model` on batches of images and targets: two lists, an entry for each image.

    An image is (3, height, width) in [0, 1]. A target holds `boxes` (n, 4), x1 y1 x2 y2 in pixels, and
    `labels` (n,) from 1; it may hold `masks` (n, height, width), `iscrowd` (n,), `area` (n,) and
    `image_id`, by which an image that two processes have seen is scored once.

    Logs train/loss and each of the model's losses under train/NAME; val/map, val/map_50, val/map_75,
    val/map_small, val/map_medium, val/map_large and the same under test/, there also test/map/CLASS.
    Models with masks add mask_map and so on. All are fractions in [0, 1]; a size or class of which there
    is no object is left out. With a WandbLogger the first validation images are logged with their boxes.

    Args:
        model: as torchvision's detectors: in train mode (images, targets) -> a dict of losses; in eval
            mode images -> a list of dicts `boxes`, `scores`, `labels` and perhaps `masks`.
        num_classes: how many classes there are, the background not counted: labels are 1 … num_classes.
        class_names: their names, that of label 1 first; None numbers them.
        optim: the optimizer's options, also as a plain mapping; None takes the defaults. `head_lr` is the
            rate of the layers that predict classes and boxes.
        area_scale: lengths are multiplied by this before COCO's limits of small and large objects (32²
            and 96² pixels) apply.
        score_threshold: in pictures, predictions below it are left out.

    Raises:
        ConfigError: one line for each bad option.
    """

    scores: tuple[Score, ...] = SCORES

    def __init__(
        self,
        model: nn.Module,
        num_classes: Annotated[int, at_least(1)],
        class_names: Annotated[Sequence[str] | None, listed("a list of names", TEXT)] = None,
        optim: OptimOptions = None,
        area_scale: Annotated[float, above(0, note="1 for COCO's own sizes")] = 1.0,
        score_threshold: Annotated[float, between(0, 1)] = 0.5,
    ) -> None:
        super().__init__()
        masks = has_masks(model)
        require(ObjectDetector, locals(), _apart(num_classes, class_names, area_scale, masks))
        self.model = model
        self.optim = OptimConfig.of(optim)
        self.class_names = list(class_names or map(str, range(1, num_classes + 1)))
        self.score_threshold = score_threshold
        # Plain types, so that the checkpoint loads with weights_only=True.
        self.save_hyperparameters(
            {
                "num_classes": num_classes,
                "class_names": self.class_names,
                "optim": self.optim.to_dict(),
                "area_scale": area_scale,
                "score_threshold": score_threshold,
            }
        )
        self.scores = SCORES + MASK_SCORES * masks
        self.val_precision = AveragePrecision(masks, area_scale)
        self.test_precision = AveragePrecision(masks, area_scale, per_class=True, curves=True)
        self.before_precision = AveragePrecision(masks, area_scale, curves=True)
        self._findings = Findings(score_threshold)
        self._tested: dict[str, Detections] = {}  # by the state of the model
        self._pictures: list[tuple[Tensor, dict[str, Any], dict[str, Tensor]]] = []

    def setup(self, stage: str) -> None:
        precision = self.trainer.precision
        parts = {type(module).__module__ for module in self.model.modules()}
        suppresses = any(part.startswith("torchvision.models.detection") for part in parts)
        if suppresses and precision in ("bf16-true", "16-true"):
            raise ConfigError([
                f"trainer.precision={precision}: torchvision cannot suppress double boxes in half precision. "
                f"Take {precision.removesuffix('true')}mixed, which computes it in float32."
            ])  # fmt: skip

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Predictions of the model in eval mode."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses: dict[str, Tensor] = self.model(images, targets)
        loss = sum(losses.values())
        assert isinstance(loss, Tensor)
        self.log_dict({f"train/{n}": t.detach() for n, t in losses.items()}, batch_size=len(images))
        self.log("train/loss", loss, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        predictions = self.model(images)
        self.val_precision.update(predictions, targets)
        if self._wandb():
            room = LOGGED_PICTURES - len(self._pictures)
            self._pictures += list(zip(images, targets, predictions, strict=True))[:room]

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", scores_of(self.val_precision.compute(), self.class_names))
        self.val_precision.reset()
        for logger in self._wandb():
            pictures = self._pictures[: tracker_of(logger).allowed.examples]
            log_to_wandb(logger, "val/predictions", pictures, self.class_names, self.score_threshold)
        self._pictures.clear()

    def on_test_start(self) -> None:
        self._findings = Findings(self.score_threshold, self.kept_examples)
        self.test_precision.extended_summary = self.pictured  # curves are for the page

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        found = {self.now: self.model(images)}
        self.test_precision.update(found[self.now], targets)
        if self._tests_before():
            with self.as_before():
                found = {BEFORE: self.model(images), **found}
            self.before_precision.update(found[BEFORE], targets)
        if self.pictured and self.trainer.is_global_zero:
            self._findings.add(images, targets, found)

    def _tests_before(self) -> bool:
        return self.pictured and self.has_before()

    def on_test_epoch_end(self) -> None:
        gathered = {BEFORE: self.before_precision} if self._tests_before() else {}
        gathered[self.now] = self.test_precision
        self._tested = {
            state: detections_of(one, self.class_names, self.score_threshold)
            for state, one in gathered.items()
        }
        self._log_scores("test", self._tested[self.now].scores)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of the last test's mAP and AP50 of boxes, by the bootstrap over images."""
        return dict(self._tested[self.now].intervals) if self._tested else {}

    def before(self) -> dict[str, Any]:
        """Scores and intervals of the same test before training, for the head of the run's page; empty where
        nobody knows them."""
        base = self._tested.get(BEFORE)
        return {} if base is None else {"scores": base.scores, "intervals": base.intervals}

    def _log_scores(self, stage: str, scores: Mapping[str, float]) -> None:
        """Every process has computed the same."""
        for name, value in scores.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "map", sync_dist=True)

    def confusion(self) -> Confusion | None:
        """What objects and background of the last test were taken for, for trackers."""
        if not self._tested:
            return None
        counts = self._tested[self.now].taken_for
        return Confusion([*self.class_names, BACKGROUND], counts.tolist())

    def _wandb(self) -> list[WandbLogger]:
        if not self.trainer.is_global_zero or self.trainer.sanity_checking:
            return []
        return [
            logger
            for logger in self.trainer.loggers
            if isinstance(logger, WandbLogger) and tracker_of(logger).allowed.examples
        ]

    def report(self, data: L.LightningDataModule, folder: str | os.PathLike[str]) -> list[str]:
        """Pictures of the last test's images in `folder`: contact_sheet.png and sections of the page, where
        each picture has the truth beside what the model found before (if it is adapted) and after training,
        and each class its curve of precision by recall.

        Returns:
            Lines to print; none before a test.
        """
        if not (self._tested and self._findings.kept.count):
            return []
        return write_report(self._findings, self._tested, self.class_names, Path(folder))

    def examples(self, data: L.LightningDataModule, most: int) -> list[Example]:
        """The last test's first images, of those that were kept, with the truth and what was found before (if
        the model is adapted) and after."""
        return examples_of(self._findings.kept.first[:most], self.class_names, self.score_threshold)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        layers = [self.model.get_submodule(name) for name in find_heads(self.model)]
        return configured(self, {p for layer in layers for p in layer.parameters()}, self.optim)


def has_masks(model: nn.Module) -> bool:
    """Whether a detector gives masks, as torchvision's Mask R-CNN does."""
    return getattr(getattr(model, "roi_heads", None), "mask_predictor", None) is not None


def _apart(num_classes: Any, class_names: Any, area_scale: Any, masks: bool) -> list[str]:
    """What is wrong in options taken together."""
    found = []
    if is_whole(num_classes) and isinstance(class_names, Sequence) and len(class_names) != num_classes:
        found.append(
            f"class_names={list(class_names)!r}: {len(class_names)} names for num_classes={num_classes}: "
            "give as many; the "
            "background has no name."
        )
    if masks and is_number(area_scale) and area_scale != 1:
        found.append(f"area_scale={area_scale!r}: masks are not scaled: give 1.")
    return found
