"""The page of a tested classifier, report.html: scores, confusions, classes, confidence, worst pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_lightning.report import specs
from lora_lightning.report.charts import chart
from lora_lightning.report.page import Section, leave, table, text
from lora_lightning.tasks.bootstrap import RESAMPLES
from lora_lightning.tasks.classification_pictures import cards, chosen
from lora_lightning.tasks.classification_scores import score_intervals, score_values
from lora_lightning.tasks.classification_tables import (
    ClassRates,
    both_class_rates,
    confusion_matrix,
    most_confused,
    per_class_rows,
    reliability_of,
    write_per_class,
)
from lora_lightning.tasks.predictions import Predictions
from lora_lightning.tasks.reporting import BEFORE, bars_in_words
from lora_lightning.tasks.scores import Score
from lora_lightning.utils.plurals import counted

MATRIX = 50  # classes up to which a confusion matrix is drawn
BARS = 30  # classes with bars: those with the lowest F1
ROWS = 1000  # of a table of classes
PAIRS = 12  # that are confused most


Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # header and rows


@dataclass(frozen=True)
class Outcome:
    """A classifier's last test: what it predicted, the names of its classes, its scores, and the accuracy in
    the source domain, by what the model was then."""

    predictions: Predictions
    names: Sequence[str]
    scores: Sequence[Score]
    source: Mapping[str, float]


def write_report(outcome: Outcome, data: Any, folder: Path) -> list[str]:
    """The sections of a classifier's page, and of classes per_class.csv.

    Args:
        data: `show(part, index)` gives a name and a picture; without it there are no pictures.

    Returns:
        Lines to print.
    """
    found = outcome.predictions
    names = specs.apart(outcome.names)
    sections = [_numbers(outcome)]
    if found.target == "class":
        sections.append(_confusions(found, names))
    if found.target == "number":
        sections.append(_scatter(found))
    else:
        after, before = both_class_rates(found)
        header, rows = per_class_rows(outcome.names, after, before)
        write_per_class(folder / "per_class.csv", header, rows)
        sections += [_classes(names, found.now, after, before, _listed(header, rows)), _reliability(found)]
    for title, indices in chosen(found).items():
        sections.append(Section(title, cards(found, outcome.names, indices, data)))
    leave(folder, sections, _title(found))
    return _lines(outcome)


def tables(found: Predictions, names: Sequence[str]) -> dict[str, Table]:
    """What loggers show as tables: the classes, and which are confused most."""
    if found.target == "number":
        return {}
    shown: dict[str, Table] = {"per_class": per_class_rows(names, *both_class_rates(found))}
    if found.target == "class" and (pairs := _pairs(found, names)):
        shown["confused"] = (["true", "predicted", "pictures", "% of the true"], [list(p) for p in pairs])
    return shown


def _title(found: Predictions) -> str:
    return "Numbers from pictures" if found.target == "number" else "Classified pictures"


def _lead(outcome: Outcome) -> str:
    found = outcome.predictions
    classes = "" if found.target == "number" else f" of {found.classes} classes"
    words = [
        f"{counted(len(found), 'test picture')}{classes}.",
        "In brackets, 95 % intervals by the bootstrap over pictures.",
    ]
    if found.before is not None:
        words.append("“Before” is the same model before training; a head that was new then only guesses.")
    if _is_calibrated(found):
        words.append(
            f"Probabilities are calibrated by the temperature {found.temperature:.3g}, fitted on the "
            "validation pictures; it changes no prediction."
        )
    if found.target != "number":
        words.append(
            "ECE is the expected calibration error: how far a probability lies from how often it is right."
        )
    words += _of_source(outcome.source)
    return f"<p>{text(' '.join(words), 2000)}</p>"


def _is_calibrated(found: Predictions) -> bool:
    """Whether a temperature was fitted that changes something."""
    return found.temperature not in (None, 1.0)


def _of_source(source: Mapping[str, float]) -> list[str]:
    """A sentence, where there is something to compare."""
    shown = {name: f"{100 * value:.1f} %" for name, value in source.items()}
    if "source_off" in shown:
        on, off = shown["source"], shown["source_off"]
        return [f"Source domain: {on} with the adapter on, {off} with it off, as before."]
    if "source_before" in shown:
        return [f"Source domain: {shown['source']} after training, {shown['source_before']} before."]
    return []


def _numbers(outcome: Outcome) -> Section:
    """The scores, after and before."""
    states, now = outcome.predictions.states(), outcome.predictions.now
    values = {name: score_values(state) for name, state in states.items()}
    bounds = {name: score_intervals(state, RESAMPLES) for name, state in states.items()}
    rows = []
    for score in outcome.scores:
        if score.name in values[now]:
            cells = [score.show(values[s].get(score.name), bounds[s].get(score.name)) for s in states]
            rows.append([score.label, *cells])
    if outcome.source:
        shares = {"source_off": BEFORE, "source_before": BEFORE, "source": now}
        known = {shares[name]: share for name, share in outcome.source.items()}
        cells = [Score(s, "").show(known.get(s)) for s in states]
        rows.append(["source domain, accuracy %", *cells])
    return Section("Scores on the test pictures", _lead(outcome) + table(["", *states], rows))


def _confusions(found: Predictions, names: Sequence[str]) -> Section:
    parts = []
    if found.classes <= MATRIX:
        side, margin = 26 if found.classes <= specs.WRITTEN else 14, 90
        figures = [
            f"<div><h3>{name}</h3>{_matrix(state, names, name, side * found.classes + margin)}</div>"
            for name, state in found.states().items()
        ]
        parts.append('<p class="soft">Rows are true classes, columns predicted ones.</p>')
        parts.append(f'<div class="two">{"".join(figures)}</div>')
    if pairs := _pairs(found, names):
        parts.append("<h3>Confused most</h3>")
        parts.append(table(["true", "predicted", "pictures", "% of the true"], pairs, left=2))
    return Section("What is taken for what", "".join(parts))


def _matrix(found: Predictions, names: Sequence[str], state: str, side: int) -> str:
    spec = specs.confusion(confusion_matrix(found), names)
    return chart(spec, f"confusion matrix, {state}", min(side, 8 * len(names) + 90), side)


def _pairs(found: Predictions, names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    return [
        (names[i], names[j], str(count), f"{100 * share:.0f}")
        for i, j, count, share in most_confused(confusion_matrix(found), PAIRS)
    ]


def _classes(
    names: Sequence[str], now: str, after: ClassRates, before: ClassRates | None, every: str
) -> Section:
    """Bars, in the order of the classes; of many, those with the lowest F1, the lowest first; and all in
    numbers."""
    shown = {"precision": "precision %", "recall": "recall %"}
    shown |= {"ap": "AP %"} if "ap" in after.names else {}
    order = np.argsort(np.nan_to_num(after.of("f1"), nan=-1), kind="stable")
    order = order[after.pictures[order] > 0][:BARS]
    if len(names) <= BARS:
        order = np.sort(order)
    figures = []
    for name, title in shown.items():
        rows = [{"class": names[i], title: None, **_rates(name, title, int(i), after, before)} for i in order]
        figures.append(chart(specs.bars(rows, "class", title), f"{title} of each class"))
    few = len(names) <= BARS
    title = "Classes" if few else f"The {len(order)} classes with the lowest F1"
    note = bars_in_words([BEFORE, now] if before else [now])
    return Section(title, f'<p class="soft">{note}</p><div class="two">{"".join(figures)}</div>{every}')


def _listed(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Every class in numbers, folded away."""
    last = next(i for i, name in enumerate(header) if name.endswith("_low"))
    cells = [
        [*row[:2], *("–" if v is None else f"{100 * v:.1f}" for v in row[2:last])] for row in rows[:ROWS]
    ]
    every = table([*header[:2], *(f"{name} %" for name in header[2:last])], cells)
    more = f" (the first {ROWS}; all in per_class.csv)" if len(rows) > ROWS else ""
    return f"<details><summary>All classes in numbers{more}</summary>{every}</details>"


def _rates(
    name: str, title: str, i: int, after: ClassRates, before: ClassRates | None
) -> dict[str, float | None]:
    """In percent: the value, its interval, and the value before."""
    row = after.names.index(name)
    low, high = after.bounds[row, i]
    found = {title: after.values[row, i], "low": low, "high": high}
    if before:
        found["before"] = before.values[row, i]
    return {key: None if np.isnan(value) else 100 * float(value) for key, value in found.items()}


def _reliability(found: Predictions) -> Section:
    states = {"as trained": reliability_of(found, calibrated=False)}
    if _is_calibrated(found):
        states[f"at temperature {found.temperature:.3g}"] = reliability_of(found, calibrated=True)
    note = (
        "How often a prediction is right, by its probability. A point below the dashed line is too sure; the "
        "larger it is, the more predictions there are."
    )
    figure = chart(specs.reliability(states), "reliability diagram", widest=440)
    return Section("Is it as sure as it should be?", f'<p class="soft">{note}</p>{figure}')


def _scatter(found: Predictions) -> Section:
    states = {state: one.predicted.numpy() for state, one in found.states().items()}
    figure = chart(specs.scatter(found.truths.numpy(), states), "predicted over true numbers", widest=520)
    return Section("Predicted and true", figure)


def _lines(outcome: Outcome) -> list[str]:
    """What the table does not say."""
    found, lines = outcome.predictions, []
    lines += _of_source(outcome.source)
    if found.target == "class" and (pairs := _pairs(found, outcome.names)):
        said = ", ".join(f"{true} as {predicted} ({count})" for true, predicted, count, _ in pairs[:3])
        lines.append(f"Taken for another most often: {said}.")
    if _is_calibrated(found):
        values = score_values(found)
        gained = f"the calibration error from {100 * values['ece_raw']:.1f} to {100 * values['ece']:.1f} %"
        lines.append(f"Temperature {found.temperature:.3g}, fitted on the validation pictures: {gained}.")
    return [*lines, ""] if lines else []
