"""What a classifier makes of each class, in numbers: rates with intervals, confusions, reliability."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_lightning.tasks.bootstrap import Array, intervals
from lora_lightning.tasks.classification_scores import (
    BINS,
    average_precisions,
    bin_sums,
    class_rates,
    label_rates,
)
from lora_lightning.tasks.predictions import Predictions
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.spreadsheet import safe_cell

RATES = ("precision", "recall", "f1")


@dataclass(frozen=True)
class ClassRates:
    """Of each class: how many pictures are of it, its rates and their intervals; NaN where there is none.

    Attributes:
        pictures: (classes,).
        values: (rates, classes), in the order of `names`.
        bounds: (rates, classes, 2).
        names: of the rates: precision, recall, f1, and of several classes at once ap.
    """

    pictures: Array
    values: Array
    bounds: Array
    names: tuple[str, ...]

    def of(self, name: str) -> Array:
        """(classes,)"""
        return self.values[self.names.index(name)]


def both_class_rates(found: Predictions) -> tuple[ClassRates, ClassRates | None]:
    """Of now, with intervals, and of before, without."""
    earlier = found.as_before()
    return class_rates_of(found), None if earlier is None else class_rates_of(earlier, with_intervals=False)


def class_rates_of(found: Predictions, with_intervals: bool = True) -> ClassRates:
    """Precision, recall and F1 of each class, of several classes at once average precision too."""
    truths, predicted = found.truths.numpy(), found.predicted.numpy()
    several = found.target == "classes"

    def statistic(counts: Array) -> Array:
        rates = (
            label_rates(counts, truths, predicted)
            if several
            else class_rates(counts, truths, predicted, found.classes)
        )
        return np.concatenate(rates, axis=1)

    once = np.ones((1, len(found)), dtype=np.float32)
    values = statistic(once).reshape(3, found.classes)
    bounds = np.full((3, found.classes, 2), np.nan)
    if with_intervals:
        bounds = intervals(statistic, len(found)).reshape(3, found.classes, 2)
    pictures = truths.sum(0) if several else np.bincount(truths, minlength=found.classes)
    if not several:
        return ClassRates(pictures, values, bounds, RATES)
    precision = average_precisions(once, found)
    return ClassRates(
        pictures,
        np.concatenate([values, precision]),
        np.concatenate([bounds, np.full((1, found.classes, 2), np.nan)]),
        (*RATES, "ap"),
    )


def confusion_matrix(found: Predictions) -> Array:
    """(classes, classes): how many pictures of each true class, a row, were taken for each, a column."""
    pairs = found.truths.numpy() * found.classes + found.predicted.numpy()
    return np.bincount(pairs, minlength=found.classes**2).reshape(found.classes, found.classes)


def most_confused(counts: Array, most: int) -> list[tuple[int, int, int, float]]:
    """True class, predicted class, how many pictures, and their share of the true class; the most first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    totals = counts.sum(1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(i), len(counts)) for i in order]
    return [(i, j, int(wrong[i, j]), wrong[i, j] / totals[i]) for i, j in pairs if wrong[i, j]]


def reliability_of(found: Predictions, calibrated: bool) -> tuple[Array, Array, Array]:
    """In each of 15 bins of confidence: the share that is right, the mean confidence, and how many; of
    several classes at once of each class of each picture."""
    probabilities = found.probabilities(calibrated)
    if found.target == "class":
        surest = probabilities.max(1)
        sure, right = surest.values[:, None].numpy(), (surest.indices == found.truths)[:, None].numpy()
    else:
        sure, right = probabilities.numpy(), found.truths.numpy()
    columns = [
        bin_sums(np.asarray(values, dtype=np.float32), sure).sum(0) for values in (right, sure, sure * 0 + 1)
    ]
    hits, total, counts = (
        np.append(c[: BINS - 1], c[BINS - 1 :].sum()) for c in columns
    )  # certainty is sure
    with np.errstate(invalid="ignore"):
        return hits / counts, total / counts, counts


def per_class_rows(
    names: Sequence[str], after: ClassRates, before: ClassRates | None
) -> tuple[list[str], list[list[Any]]]:
    """Header and a row a class: pictures, rates from 0 to 1, their intervals, and the rates of before."""
    header = ["class", "pictures", *after.names]
    header += [f"{name}_{bound}" for name in RATES for bound in ("low", "high")]
    header += [f"{name}_before" for name in after.names] if before else []
    rows: list[list[Any]] = []
    for i, name in enumerate(names):
        cells = [*after.values[:, i], *after.bounds[:3, i].ravel(), *(before.values[:, i] if before else ())]
        rows.append(
            [name, int(after.pictures[i]), *(None if np.isnan(v) else round(float(v), 4) for v in cells)]
        )
    return header, rows


def write_per_class(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A CSV for programs and spreadsheets; what has no value is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if c is None else safe_cell(c) if isinstance(c, str) else c for c in row])
    write_whole(path, lambda name: Path(name).write_text(file.getvalue(), encoding="utf-8"))
