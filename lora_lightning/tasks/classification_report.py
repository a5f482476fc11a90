"""The page of a tested classifier, report.html: scores, confusions, classes, confidence, worst pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_lightning.report.page import table, text, write_page
from lora_lightning.tasks import charts
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
from lora_lightning.tasks.scores import Score

MATRIX = 50  # classes up to which a confusion matrix is drawn
BARS = 30  # classes with bars: those with the lowest F1
ROWS = 1000  # of a table of classes
PAIRS = 12  # that are confused most


Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # header and rows


@dataclass(frozen=True)
class Outcome:
    """A classifier's last test: what it predicted, the names of its classes, its scores, and the accuracy in
    the source domain by the adapter's state."""

    predictions: Predictions
    names: Sequence[str]
    scores: Sequence[Score]
    source: Mapping[str, float]


def write_report(outcome: Outcome, data: Any, folder: Path) -> list[str]:
    """report.html, and of classes per_class.csv.

    Args:
        data: `show(part, index)` gives a name and a picture; without it there are no pictures.

    Returns:
        Lines to print.
    """
    found = outcome.predictions
    parts = [_lead(outcome), *_numbers(outcome)]
    if found.target == "class":
        parts += _confusions(found, outcome.names)
    if found.target == "number":
        parts += _scatter(found)
    else:
        after, before = both_class_rates(found)
        header, rows = per_class_rows(outcome.names, after, before)
        write_per_class(folder / "per_class.csv", header, rows)
        parts += [*_classes(outcome.names, after, before), _listed(header, rows), *_reliability(found)]
    for title, indices in chosen(found).items():
        parts += [f"<h2>{text(title)}</h2>", cards(found, outcome.names, indices, data)]
    write_page(folder / "report.html", _title(found), [], "\n".join(parts))
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
        f"{len(found)} test pictures{classes}. In brackets, 95 % intervals by the bootstrap over pictures."
    ]
    if found.before is not None:
        words.append(
            "“Before” is the same model with its adapter off; a head that was new then only guesses."
        )
    if found.temperature != 1:
        words.append(
            f"Probabilities are calibrated by the temperature {found.temperature:.3g}, fitted on the "
            "validation pictures; it changes no prediction."
        )
    return f"<p>{' '.join(map(text_of, words))}</p>"


def text_of(words: str) -> str:
    """A sentence as HTML, of any length."""
    return text(words, 1000)


def _numbers(outcome: Outcome) -> list[str]:
    """The scores, after and before."""
    states = {"after": outcome.predictions}
    if (before := outcome.predictions.as_before()) is not None:
        states = {"before": before, "after": outcome.predictions}
    values = {name: score_values(state) for name, state in states.items()}
    bounds = {name: score_intervals(state, RESAMPLES) for name, state in states.items()}
    if outcome.predictions.temperature != 1 and "before" in states:  # to which none was fitted
        values["before"]["ece_raw"] = values["before"].pop("ece")
        bounds["before"]["ece_raw"] = bounds["before"].pop("ece")
    rows = []
    for score in outcome.scores:
        if score.name in values["after"]:
            cells = [score.show(values[s].get(score.name), bounds[s].get(score.name)) for s in states]
            rows.append([score.label, *cells])
    if outcome.source:
        share = {
            state: outcome.source.get(name) for state, name in (("before", "source_off"), ("after", "source"))
        }
        cells = [Score(s, "").show(share[s]) for s in states]
        rows.append(["source domain, accuracy %", *cells])
    return ["<h2>Scores</h2>", table(["", *states], rows)]


def _confusions(found: Predictions, names: Sequence[str]) -> list[str]:
    parts = ["<h2>What is taken for what</h2>"]
    if found.classes <= MATRIX:
        before = found.as_before()
        states = {"now": found} if before is None else {"before": before, "now": found}
        figures = [
            f"<figure>{charts.confusion(confusion_matrix(state), names, f'confusion matrix, {name}')}"
            f"<figcaption>{name}: rows are true classes, columns predicted ones</figcaption></figure>"
            for name, state in states.items()
        ]
        parts.append(f'<div class="two">{"".join(figures)}</div>')
    if pairs := _pairs(found, names):
        parts.append("<h3>Confused most</h3>")
        parts.append(table(["true", "predicted", "pictures", "% of the true"], pairs, left=2))
    return parts


def _pairs(found: Predictions, names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    return [
        (names[i], names[j], str(count), f"{100 * share:.0f}")
        for i, j, count, share in most_confused(confusion_matrix(found), PAIRS)
    ]


def _classes(names: Sequence[str], after: ClassRates, before: ClassRates | None) -> list[str]:
    """Bars, in the order of the classes; of many, those with the lowest F1, the lowest first."""
    shown = {"precision": "precision", "recall": "recall"} | ({"ap": "AP"} if "ap" in after.names else {})
    order = np.argsort(np.nan_to_num(after.of("f1"), nan=-1), kind="stable")
    order = order[after.pictures[order] > 0][:BARS]
    if len(names) <= BARS:
        order = np.sort(order)
    bars = [(names[i], [_value(name, int(i), after, before) for name in shown]) for i in order]
    title = "Classes" if len(names) <= BARS else f"The {len(bars)} classes with the lowest F1"
    note = "The bar is now, the thin line its interval, the mark before." if before else "With intervals."
    return [f'<h2>{title}</h2><p class="soft">{note}</p>', charts.class_bars(bars, list(shown.values()))]


def _listed(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Every class in numbers, folded away."""
    last = next(i for i, name in enumerate(header) if name.endswith("_low"))
    cells = [
        [*row[:2], *("–" if v is None else f"{100 * v:.1f}" for v in row[2:last])] for row in rows[:ROWS]
    ]
    every = table([*header[:2], *(f"{name} %" for name in header[2:last])], cells)
    more = f" (the first {ROWS}; all in per_class.csv)" if len(rows) > ROWS else ""
    return f"<details><summary>All classes in numbers{more}</summary>{every}</details>"


def _value(
    name: str, i: int, after: ClassRates, before: ClassRates | None
) -> tuple[float | None, list[float], float | None]:
    """What `class_bars` takes: value, interval, value before."""
    row = after.names.index(name)
    bounds = after.bounds[row, i]
    return (
        _known(after.values[row, i]),
        [] if np.isnan(bounds).any() else bounds.tolist(),
        _known(before.values[row, i]) if before else None,
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _reliability(found: Predictions) -> list[str]:
    states = {"as trained": False} | (
        {f"at temperature {found.temperature:.3g}": True} if found.temperature != 1 else {}
    )
    figures = []
    for name, calibrated in states.items():
        chart = charts.reliability(*reliability_of(found, calibrated), f"reliability diagram, {name}")
        figures.append(f"<figure>{chart}<figcaption>{name}</figcaption></figure>")
    note = (
        "How often a prediction is right (%), by its probability (%). The red marks are the probabilities: "
    )
    note += "a bar below its mark is too sure. Below, in grey, how many predictions there are."
    return [
        "<h2>Is it as sure as it should be?</h2>",
        f"<p class='soft'>{note}</p>",
        f'<div class="two">{"".join(figures)}</div>',
    ]


def _scatter(found: Predictions) -> list[str]:
    before = found.as_before()
    chart = charts.scatter(
        found.truths.numpy(),
        found.predicted.numpy(),
        None if before is None else before.predicted.numpy(),
        "predicted over true numbers",
    )
    note = "Predicted numbers over true ones" + ("; grey: before" if before is not None else "")
    return ["<h2>Predicted and true</h2>", f"<figure>{chart}<figcaption>{note}</figcaption></figure>"]


def _lines(outcome: Outcome) -> list[str]:
    """What the table does not say."""
    found, lines = outcome.predictions, []
    if "source_off" in outcome.source:
        shares = [f"{100 * outcome.source[name]:.1f} %" for name in ("source", "source_off")]
        lines.append(f"Source domain: {shares[0]} with the adapter on, {shares[1]} with it off, as before.")
    if found.target == "class" and (pairs := _pairs(found, outcome.names)):
        said = ", ".join(f"{true} as {predicted} ({count})" for true, predicted, count, _ in pairs[:3])
        lines.append(f"Taken for another most often: {said}.")
    if found.temperature != 1:
        values = score_values(found)
        gained = f"the calibration error from {100 * values['ece_raw']:.1f} to {100 * values['ece']:.1f} %"
        lines.append(f"Temperature {found.temperature:.3g}, fitted on the validation pictures: {gained}.")
    return [*lines, ""] if lines else []
