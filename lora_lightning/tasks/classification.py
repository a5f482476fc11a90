"""ImageClassifier: any model that maps images to logits, for one class, several classes or a number."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchmetrics import MetricCollection

from lora_lightning.methods.optimizers import head_parameters
from lora_lightning.tasks.classification_checks import problems_of
from lora_lightning.tasks.classification_examples import confusion_of, examples_of
from lora_lightning.tasks.classification_losses import Loss
from lora_lightning.tasks.classification_report import Outcome, tables, write_report
from lora_lightning.tasks.classification_scores import (
    calibration_error,
    metrics_of,
    score_intervals,
    score_values,
    scores_of,
)
from lora_lightning.tasks.optim import configured
from lora_lightning.tasks.optim_config import OptimConfig, OptimOptions
from lora_lightning.tasks.predictions import Collector, Predictions, numbers
from lora_lightning.tasks.reporting import Reporting
from lora_lightning.tasks.scores import Score
from lora_lightning.tasks.temperature import fitted_temperature
from lora_lightning.trainer.trackers.tracker import Confusion, Example
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import TEXT, above, at_least, listed, number

Batch = Sequence[Tensor]  # images, targets, and in training perhaps weights
NUMBERS = listed("a number for each class", number())


class ImageClassifier(Reporting, L.LightningModule):
    """Trains `model` on batches of images (batch, channels, height, width) and targets, in training perhaps
    with weights (batch,) of their losses.

    Targets are class indices (batch,) or, from mixup and cutmix, probabilities (batch, classes); of several
    classes at once (batch, classes) in [0, 1]; or numbers (batch,). Logs train/loss, and under val/ and test/
    loss and the `scores`: accuracy, top-5 accuracy where there are more than five classes, and macro F1; of
    several classes mAP, macro and micro F1; of numbers MAE, RMSE and R². test/ece_raw is the calibration
    error.

    A `Trainer.validate` before `Trainer.test` fits the temperature that makes the validation part's
    probabilities honest (Guo et al. 2017, arXiv 1706.04599); it changes no prediction. test/ece is the
    calibration error with it.

    Args:
        model: images -> logits (batch, num_classes).
        num_classes: how many classes there are; of a number 1.
        class_names: their names, that of class 0 first; None numbers them.
        target: "class", each picture is of one class; "classes", of any number of them; "number".
        class_weights: of the loss, a number a class; of several classes, the weight of those that hold.
        logit_adjustment: added to the logits in training, a number a class (Menon et al. 2020, arXiv
            2007.07314).
        number_mean, number_std: by which numbers are standardized.
        optim: the optimizer's options, also as a plain mapping; None takes the defaults.
        label_smoothing: the share of each training label spread over all classes, in [0, 1).
        test_flips: evaluate each picture and its mirror image, and take the mean of their logits.
        calibrate: fit the temperature.

    Attributes:
        predictions: of the last test; None before.
        source: accuracy in the domain that the base was trained on, where the data have one: "source" as the
            model is, "source_off" with its adapter off, "source_before" of one that trained in full.
        temperature: what was fitted; None before.

    Raises:
        ConfigError: one line for each bad option.
    """

    scores: tuple[Score, ...] = scores_of("class", 2, calibrated=True)

    def __init__(
        self,
        model: nn.Module,
        num_classes: Annotated[int, at_least(1)],
        class_names: Annotated[Sequence[str] | None, listed("a list of names", TEXT)] = None,
        target: Literal["class", "classes", "number"] = "class",
        class_weights: Annotated[Sequence[float] | None, NUMBERS] = None,
        logit_adjustment: Annotated[Sequence[float] | None, NUMBERS] = None,
        number_mean: float | None = None,
        number_std: Annotated[float | None, above(0)] = None,
        optim: OptimOptions = None,
        label_smoothing: Annotated[float, at_least(0, below=1)] = 0.0,
        test_flips: bool = False,
        calibrate: bool = True,
    ) -> None:
        super().__init__()
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        require(ImageClassifier, options, problems_of(options))
        self.model = model
        self.target = target
        self.optim = OptimConfig.of(optim)
        self.class_names = list(class_names or map(str, range(num_classes)))
        self.test_flips, self.calibrate = test_flips, calibrate and target != "number"
        self.number_mean = 0.0 if number_mean is None else float(number_mean)
        self.number_std = 1.0 if number_std is None else float(number_std)
        self.loss = Loss(
            target, label_smoothing, _tensor(class_weights), _tensor(logit_adjustment),
            self.number_mean, self.number_std,
        )  # fmt: skip
        # Plain types, so that the checkpoint loads with weights_only=True.
        plain = {
            n: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
            for n, v in options.items()
            if n != "model"
        }
        self.save_hyperparameters({**plain, "optim": self.optim.to_dict()})
        self.scores = scores_of(target, num_classes, self.calibrate, self.number_std)
        self.val_metrics: MetricCollection = metrics_of(target, num_classes)
        self.temperature: float | None = None
        self.temperature_before: float | None = None  # of the model before training
        self.predictions: Predictions | None = None
        self.source: dict[str, float] = {}
        self._collected = Collector()

    @property
    def monitors(self) -> tuple[str, ...]:
        """What validation logs under val/, the first score first."""
        names = (score.name for score in self.scores)
        return (*(name for name in names if name in self.val_metrics), "loss")

    def configure_model(self) -> None:
        """Under Lightning's ModelParallelStrategy, shard the model, which is adapted by now, over all
        processes (FSDP2): each block, and the rest. What is frozen may stand beside what trains."""
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for part in reversed(list(self.model.modules())):  # inner blocks before outer ones
            if isinstance(part, (nn.Sequential, nn.ModuleList)):
                for block in part:
                    if any(block.children()):
                        fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes); of a number, standardized, (batch, 1)."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets, *weights = batch
        loss = self.loss.train(self(images), targets, *weights)
        self.log("train/loss", loss)
        return loss

    def on_fit_start(self) -> None:
        self.temperature = self.temperature_before = None

    def on_validation_start(self) -> None:
        self._collected = Collector()

    def on_test_start(self) -> None:
        self._collected = Collector()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, targets = batch[0], self._hard(batch[1])
        logits = self._logits(images)
        loss = self.loss.plain(logits, targets)
        self.log(f"{stage}/loss", loss, batch_size=len(images), sync_dist=True)
        if stage == "val":
            self.val_metrics.update(self._meant(logits), targets)
        if stage == "test" or self._calibrates():
            before = self._logits_before(images) if self.pictured else None
            self._collected.add(logits, targets, before)

    def _hard(self, targets: Tensor) -> Tensor:
        """Truths as metrics take them, of what may be probabilities."""
        if self.target == "class":
            return targets if targets.ndim == 1 else targets.argmax(1)
        return (targets > 0.5).long() if self.target == "classes" else targets.reshape(-1).float()

    def _meant(self, logits: Tensor) -> Tensor:
        """Logits as metrics take them; of a number, in the units of the data (batch,)."""
        if self.target == "number":
            return numbers(logits, self.number_mean, self.number_std)[:, 0]
        return logits.float().sigmoid() if self.target == "classes" else logits.float()

    def _logits(self, images: Tensor) -> Tensor:
        """Of images that are evaluated; beside a fit without their mirror images, since it is for the end."""
        if not self.test_flips or self.trainer.state.fn == TrainerFn.FITTING:
            return self(images)
        return (self(images) + self(images.flip(-1))) / 2

    def _logits_before(self, images: Tensor) -> Tensor | None:
        """The same before training; None where nothing says it."""
        if not self.has_before():
            return None
        with self.as_before():
            return self._logits(images)

    def _calibrates(self) -> bool:
        return self.calibrate and self.trainer.state.fn == TrainerFn.VALIDATING

    def on_validation_epoch_end(self) -> None:
        if any(metric.update_called for metric in self.val_metrics.values(copy_state=False)):
            self._log("val", self.val_metrics.compute())
            self.val_metrics.reset()
        if self._calibrates() and (found := self._collected.all(self.target, self.trainer.val_dataloaders)):
            self.temperature = fitted_temperature(found.outputs, found.truths)
            if found.before is not None:
                self.temperature_before = fitted_temperature(found.before, found.truths)

    def on_test_epoch_end(self) -> None:
        found = self._collected.all(self.target, self.trainer.test_dataloaders)
        self._collected = Collector()
        if found is None:
            return
        found.temperature, found.temperature_before = self.temperature, self.temperature_before
        found.now = self.now
        # Of every picture once, which no process has a share of any more.
        metrics = metrics_of(self.target, found.classes, sync_on_compute=False)
        metrics.update(self._meant(found.outputs), found.truths)
        self._log("test", metrics.compute())
        if self.target != "number":
            self._log("test", {"ece_raw": calibration_error(found, False)})
            if self.temperature is not None:
                self._log("test", {"ece": calibration_error(found, True)})
        self.source = self._on_source()
        self._log("test", self.source)
        number = self.target == "number"
        self.predictions = found.in_units(self.number_mean, self.number_std) if number else found

    def _log(self, stage: str, values: Mapping[str, Any]) -> None:
        """Of scores that every process has computed alike."""
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == self.scores[0].name, sync_dist=True)

    def _on_source(self) -> dict[str, float]:
        """What `source` says of the model as it is now; each process sees all of the domain."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.target != "class" or not hasattr(data, "source_dataloader"):
            return {}
        before = "source_off" if self.can_be_off() else "source_before"
        right: dict[str, int] = {}
        count = 0
        with torch.no_grad():
            for images, targets in self._batches(data, data.source_dataloader()):
                count += len(targets)
                found = {"source": self._logits(images), before: self._logits_before(images)}
                for name, logits in found.items():
                    if logits is not None:
                        right[name] = right.get(name, 0) + int((logits.argmax(1) == targets).sum())
        return {name: hits / count for name, hits in right.items()}

    def _batches(self, data: L.LightningDataModule, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """As a Trainer gives them."""
        for batch in loader:
            batch = data.on_after_batch_transfer(self.trainer.strategy.batch_to_device(batch), 0)
            yield self.trainer.precision_plugin.convert_input(batch[0]), self._hard(batch[1])

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each score of the last test, by the bootstrap over pictures."""
        return {} if self.predictions is None else score_intervals(self.predictions)

    def before(self) -> dict[str, Any]:
        """Scores and intervals of the same test before training, for the head of the run's page; empty where
        nobody knows them."""
        base = None if self.predictions is None else self.predictions.as_before()
        return {} if base is None else {"scores": score_values(base), "intervals": score_intervals(base)}

    def facts(self) -> dict[str, Any]:
        """What was learned beside the weights, and belongs to the adapter: plain numbers and words."""
        return {} if self.temperature is None else {"temperature": self.temperature}

    def report(self, data: Any, folder: str | os.PathLike[str]) -> list[str]:
        """Writes report.html and per_class.csv of the last test, with pictures from `data.show`.

        Returns:
            Lines to print.
        """
        if self.predictions is None:
            return []
        return write_report(
            Outcome(self.predictions, self.class_names, self.scores, self.source), data, Path(folder)
        )

    def tables(self) -> Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]]:
        """Header and rows of what loggers show as tables, by name."""
        return {} if self.predictions is None else tables(self.predictions, self.class_names)

    def confusion(self) -> Confusion | None:
        """What was taken for what in the last test, for trackers; of pictures of one class."""
        return None if self.predictions is None else confusion_of(self.predictions, self.class_names)

    def examples(self, data: Any, most: int) -> list[Example]:
        """Pictures of the last test with what was predicted before (if the model is adapted) and after."""
        return [] if self.predictions is None else examples_of(self.predictions, self.class_names, data, most)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configured(self, head_parameters(self.model), self.optim)


def _tensor(values: Sequence[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32)
