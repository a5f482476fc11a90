"""The scores of a classifier by what it predicts: torchmetrics' own, and their bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from lora_lightning.tasks.bootstrap import RESAMPLES, Array, group_sums, intervals
from lora_lightning.tasks.classification_losses import Target
from lora_lightning.tasks.predictions import Predictions
from lora_lightning.tasks.scores import Score

BINS = 15  # of confidence, as Guo et al. 2017 have it
TOP = 5
Kind = tuple[tuple[str, ...], Callable[[Array], Array], int]  # names, their statistic, resamples at most
LONGEST = 2_000_000_000  # counts × classes that the intervals of average precision may take: a minute


def scores_of(
    target: Target, num_classes: int, calibrated: bool, number_std: float = 1.0
) -> tuple[Score, ...]:
    """What a task of this kind is judged by, the first before all.

    Args:
        calibrated: whether a temperature is fitted, so that the calibration error is shown without it, too.
        number_std: of the numbers: three significant digits of it are shown.
    """
    if target == "number":
        digits = min(8, max(0, 2 - math.floor(math.log10(number_std)))) if number_std > 0 else 3
        return (
            Score("mae", "MAE", 1, digits, best="min"),
            Score("rmse", "RMSE", 1, digits, best="min"),
            Score("r2", "R²", 1, 3),
        )
    errors = (Score("ece", "calibrated ECE %", best="min"),) * calibrated
    errors += (Score("ece_raw", "uncalibrated ECE %", best="min", in_table=not calibrated),)
    if target == "classes":
        return (Score("map", "mAP"), Score("f1", "macro F1 %"), Score("f1_micro", "micro F1 %"), *errors)
    top = (Score("top5", "top-5 %"),) * (num_classes > TOP)
    source = (Score("source", "source %"), Score("source_off", "source, off %"))
    return (Score("acc", "accuracy %"), *top, Score("f1", "macro F1 %"), *errors, *source)


def metrics_of(target: Target, num_classes: int, **options: Any) -> MetricCollection:
    """torchmetrics' own, by the names of the scores: fed with logits, probabilities of several classes at
    once, or numbers; and truths.

    Args:
        **options: of every metric.
    """
    if target == "number":
        return MetricCollection({
            "mae": MeanAbsoluteError(**options),
            "rmse": MeanSquaredError(squared=False, **options),
            "r2": Explained(**options),
        })  # fmt: skip
    if target == "classes":
        return MetricCollection({
            "map": MultilabelAveragePrecision(num_classes, **options),
            "f1": MultilabelF1Score(num_classes, average="macro", **options),
            "f1_micro": MultilabelF1Score(num_classes, average="micro", **options),
        })  # fmt: skip
    found: dict[str, Metric | MetricCollection] = {
        "acc": MulticlassAccuracy(num_classes, average="micro", **options),
        "f1": MulticlassF1Score(num_classes, average="macro", **options),
    }
    if num_classes > TOP:
        found["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=TOP, **options)
    return MetricCollection(found)


class Explained(R2Score):
    """The coefficient of determination; NaN of fewer than two numbers, which vary by nothing."""

    def compute(self) -> Tensor:
        return super().compute() if int(self.total) > 1 else torch.tensor(float("nan"))


def calibration_error(found: Predictions, calibrated: bool) -> float:
    """Expected calibration error in 15 bins (Naeini et al. 2015; Guo et al. 2017): how far, on average, the
    probability of what is predicted lies from how often that is right; of several classes at once, the
    probability of each class from how often a picture has it."""
    probabilities = found.probabilities(calibrated)
    if found.target == "class":
        error = multiclass_calibration_error(probabilities, found.truths, found.classes, n_bins=BINS)
    else:
        error = binary_calibration_error(probabilities.flatten(), found.truths.flatten(), n_bins=BINS)
    return float(error)


def score_intervals(found: Predictions, resamples: int = RESAMPLES) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each score by the bootstrap over pictures; none of what has no value."""
    result: dict[str, tuple[float, float]] = {}
    for names, statistic, most in _statistics(found):
        basic = names[0].startswith("ece")
        bounds = intervals(statistic, len(found), min(resamples, most), basic=basic)
        result |= {
            n: (float(b[0]), float(b[1])) for n, b in zip(names, bounds, strict=True) if not np.isnan(b).any()
        }
    return result


def score_values(found: Predictions) -> dict[str, float]:
    """Each score of these predictions, as the metrics of `metrics_of` have it."""
    once = np.ones((1, len(found)), dtype=np.float32)
    values = {
        n: float(v) for names, of, _ in _statistics(found) for n, v in zip(names, of(once)[0], strict=True)
    }
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _statistics(found: Predictions) -> list[Kind]:
    """Names, their statistic of the counts, and how many resamples it may take."""
    if found.target == "number":
        return [(("mae", "rmse", "r2"), _of_numbers(found), RESAMPLES)]
    statistics: list[Kind] = [(("ece_raw",), _of_calibration(found, False), RESAMPLES)]
    if found.temperature is not None:
        statistics.append((("ece",), _of_calibration(found, True), RESAMPLES))
    if found.target == "classes":
        most = max(100, LONGEST // max(1, found.outputs.numel()))
        statistics.append((("f1", "f1_micro"), _of_labels(found), RESAMPLES))
        statistics.append((("map",), _of_precision(found), most))
        return statistics
    names = ("acc", *(("top5",) if found.classes > TOP else ()), "f1")
    return [*statistics, (names, _of_classes(found), RESAMPLES)]


def _of_classes(found: Predictions) -> Callable[[Array], Array]:
    """Accuracy, top-5 where it means anything, macro F1 over the classes that a resample has."""
    truths, predicted = found.truths.numpy(), found.predicted.numpy()
    right = predicted == truths
    hits = [right.astype(np.float32)]
    if found.classes > TOP:
        best = found.outputs.topk(TOP, dim=1).indices
        hits.append((best == found.truths[:, None]).any(1).numpy().astype(np.float32))
    columns = np.stack(hits, axis=1)

    def statistic(counts: Array) -> Array:
        both = class_rates(counts, truths, predicted, found.classes)[2]
        shares = counts @ columns / counts.sum(1, keepdims=True)
        return np.concatenate([shares, _mean_of_known(both)], axis=1)

    return statistic


def _mean_of_known(values: Array) -> Array:
    """(resamples, 1), over the classes whose value is a number; NaN where there is none."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1, keepdims=True) / known.sum(1, keepdims=True)


def class_rates(counts: Array, truths: Array, predicted: Array, classes: int) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 of each class in each resample, each (resamples, classes); NaN where nothing
    is predicted to be of a class, where no picture is of it, and where neither is."""
    right = group_sums(counts, truths, classes, (predicted == truths).astype(np.float32))
    return rates(right, group_sums(counts, predicted, classes), group_sums(counts, truths, classes))


def rates(right: Array, predicted: Array, true: Array) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 of counts of any shape; NaN where they divide by 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / predicted, right / true, 2 * right / (predicted + true)


def label_rates(counts: Array, truths: Array, predicted: Array) -> tuple[Array, Array, Array]:
    """The same of several classes at once: truths and predicted are (count, classes), zeros and ones."""
    return rates(
        counts @ (truths * predicted).astype(np.float32),
        counts @ predicted.astype(np.float32),
        counts @ truths.astype(np.float32),
    )


def _of_labels(found: Predictions) -> Callable[[Array], Array]:
    truths, predicted = found.truths.numpy(), found.predicted.numpy()
    sums = np.stack([(truths * predicted).sum(1), predicted.sum(1) + truths.sum(1)], 1).astype(np.float32)

    def statistic(counts: Array) -> Array:
        macro = np.nan_to_num(label_rates(counts, truths, predicted)[2]).mean(1)  # 0, as torchmetrics has it
        right, all_of_them = (counts @ sums).T
        return np.stack([macro, 2 * right / np.maximum(1, all_of_them)], axis=1)

    return statistic


def _of_precision(found: Predictions) -> Callable[[Array], Array]:
    """Mean average precision over the classes that a resample has."""

    def statistic(counts: Array) -> Array:
        return _mean_of_known(average_precisions(counts, found))

    return statistic


def average_precisions(counts: Array, found: Predictions) -> Array:
    """Average precision of each class in each resample, (resamples, classes): the sum over the distinct
    scores of the precision there times what the recall has gained. NaN of a class without a picture."""
    values = []
    for scores, truths in zip(found.outputs.T.numpy(), found.truths.T.numpy(), strict=True):
        order = np.argsort(-scores, kind="stable")
        drawn = counts[:, order]
        right = np.cumsum(drawn * truths[order], axis=1, dtype=np.float64)
        all_of_them = np.cumsum(drawn, axis=1, dtype=np.float64)
        last = np.flatnonzero(
            np.append(np.diff(scores[order]) != 0, True)
        )  # of each score: ties count together
        right, all_of_them = right[:, last], all_of_them[:, last]
        gained = np.diff(right, axis=1, prepend=0)
        with np.errstate(invalid="ignore"):
            values.append((gained * right / np.maximum(1, all_of_them)).sum(1) / right[:, -1])
    return np.stack(values, axis=1)


def _of_calibration(found: Predictions, calibrated: bool) -> Callable[[Array], Array]:
    probabilities = found.probabilities(calibrated)
    if found.target == "class":
        surest = probabilities.max(1)
        sure, right = surest.values[:, None], (surest.indices == found.truths)[:, None]
    else:
        sure, right = probabilities, found.truths
    gaps = bin_sums((sure - right.float()).numpy(), sure.numpy())  # (count, bins)

    def statistic(counts: Array) -> Array:
        whole = counts.sum(1, keepdims=True) * sure.shape[1]
        return np.abs(counts @ gaps).sum(1, keepdims=True) / whole

    return statistic


def bin_sums(values: Array, sure: Array) -> Array:
    """The sums of each picture's values in each bin of confidence, of which certainty is one more, as
    torchmetrics has it: (count, bins + 1); both are (count, values)."""
    edges = np.linspace(0, 1, BINS + 1, dtype=np.float32)
    number = np.searchsorted(edges, sure, side="right") - 1
    sums = np.zeros((len(values), BINS + 1), dtype=np.float32)
    np.add.at(sums, (np.arange(len(values))[:, None], number), values)
    return sums


def _of_numbers(found: Predictions) -> Callable[[Array], Array]:
    truths = found.truths.double().numpy().ravel()
    errors = found.predicted.double().numpy() - truths
    columns = np.stack([np.abs(errors), errors**2, truths - truths.mean(), (truths - truths.mean()) ** 2], 1)

    def statistic(counts: Array) -> Array:
        absolute, squared, mean, square = (counts @ columns / counts.sum(1, keepdims=True)).T
        spread = square - mean**2
        explained = 1 - squared / np.where(spread > 0, spread, np.nan)
        return np.stack([absolute, np.sqrt(squared), explained], axis=1)

    return statistic
