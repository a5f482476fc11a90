"""The tables and the picture of a ledger, finished or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.methods.catalog import METHODS, REFERENCE
from benchmarks.methods.ledger import Found, Ledger
from benchmarks.methods.picture import draw, draw_curves
from benchmarks.methods.pooled import Scores, pooled
from benchmarks.methods.search import Choice, choice
from benchmarks.methods.statistics import Interval, difference, exceeds_noise, interval
from benchmarks.methods.suites import SUITES, Task

MIB = 2**20
HEAD = (
    "", "rate", "score %", "less LoRA's, by seed", "beyond the noise", "trained", "time / LoRA's", "kept MiB",
    "source on", "off", "trials",
)  # fmt: skip
NOTE = """Means over the seeds, with the interval that covers the mean with 95 % (Student's t). Differences to
LoRA are paired by seed; those that are better or worse have an interval without 0, each at 5 %: one in twenty
is chance. Time: CPU seconds of a fit, median of the ratios to LoRA's by seed. Kept: what the first step saves
for the backward, and gradients and optimizer state. Source: the score on the base's own domain, with the
adapter on and off. Trials: rates that were tried; "edge" where the best is at one of their ends;
"of" the task on which they were. The table of a whole curve takes the pairs of a seed as independent, and
beside it each amount as one value, since the seeds of an amount share one choice of the rate."""


BOUND = "full"  # the other one, over curves
OVER = (
    "", "pairs", "less LoRA's, over the pairs", "over the amounts", "less full fine-tuning's, over the pairs",
    "over the amounts",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is known of a method on a task.

    Attributes:
        score: over the final seeds, None where it is refused.
        other: the difference to LoRA.
        tests: the scores of the final seeds.
    """

    name: str
    label: str
    score: Interval | None
    other: Interval | None
    tests: dict[int, float]
    cells: tuple[str, ...]


def write(suite: str, ledger: Ledger, folder: Path) -> None:
    """The tables as `methods_SUITE.md`, and the picture beside it."""
    runs = list(ledger.runs().values())
    found = {name: rows(name, task, runs) for name, task in SUITES[suite].items()}
    found = {name: of for name, of in found.items() if of}
    parts = [NOTE, ""]
    for name, of in found.items():
        task = SUITES[suite][name]
        parts += [f"## {task.label}", "", _about(task), "", markdown(HEAD, [row.cells for row in of]), ""]
    by_task = {SUITES[suite][name]: of for name, of in found.items()}
    parts += [*_over_curves(by_task), _totals(runs)]
    text = "\n".join(parts) + "\n"
    (folder / f"methods_{suite}.md").write_text(text)
    print(text)
    draw(by_task, folder / f"methods_{suite}.png")
    draw_curves(by_task, folder / f"methods_{suite}_few.png")


def _over_curves(found: Mapping[Task, list[Row]]) -> list[str]:
    """A table for each few-shot curve, of what was trained on two amounts or more."""
    parts = []
    for curve in dict.fromkeys(task.curve[0] for task in found if task.curve):
        amounts = [
            {row.name: row.tests for row in of if row.tests}
            for task, of in found.items()
            if task.curve and task.curve[0] == curve
        ]
        lines = [_over(amounts, name) for name in METHODS if METHODS[name].method != "none"]
        if any(lines):
            parts += [f"## {curve}, all together", "", markdown(OVER, [line for line in lines if line]), ""]
    return parts


def _over(amounts: list[Scores], method: str) -> tuple[str, ...] | None:
    of = [pooled(amounts, method, other) if method != other else None for other in (REFERENCE, BOUND)]
    if not any(of):
        return None
    cells = [text for two in of for text in ([shown(d, sign=True) for d in two[:2]] if two else ["", ""])]
    return (METHODS[method].label, str(max(two[2] for two in of if two)), *cells)


def rows(name: str, task: Task, runs: Iterable[Found]) -> list[Row]:
    """Of the methods that have something to say, in the catalog's order."""
    runs = list(runs)
    own = finals(_of(runs, name, REFERENCE), _tuned(runs, name, task, REFERENCE).rate)
    found = [_row(name, task, method, runs, own) for method in METHODS]
    return [row for row in found if row is not None]


def _of(runs: Iterable[Found], task: str, method: str) -> list[Found]:
    return [run for run in runs if (run["task"], run["method"]) == (task, method)]


def _tuned(runs: Iterable[Found], name: str, task: Task, method: str) -> Choice:
    return choice(_of(runs, task.rates_of or name, method), task.better, task.budget.tuning)


def finals(runs: Iterable[Found], rate: float | None) -> dict[int, Found]:
    """The final runs at a rate, by seed."""
    of = (run for run in runs if run["stage"] == "final" and "refused" not in run)
    return {run["seed"]: run for run in of if run["lr"] == rate}


def _row(name: str, task: Task, method: str, every: list[Found], lora: dict[int, Found]) -> Row | None:
    label, trains = METHODS[method].label, METHODS[method].method != "none"
    runs = _of(every, name, method)
    tuned = _tuned(every, name, task, method) if trains else Choice(0.0, (), True)
    last = {} if tuned.rate is None else finals(runs, tuned.rate)
    refused = next((run["refused"] for run in runs if "refused" in run), None)
    if not last:
        told = (label, "", f"refused: {refused[:90]}", *[""] * (len(HEAD) - 3)) if refused else None
        return Row(method, label, None, None, {}, told) if told else None
    score, other = interval(list(_by_seed(last).values())), None
    if trains and method != REFERENCE:
        other = difference(_by_seed(last), _by_seed(lora))
    first, wanted = next(iter(last.values())), len(task.budget.seeds) if trains else 1
    cells = (
        label + (f", r = {first['rank']}" if METHODS[method].match else ""),
        f"{tuned.rate:g}" if trains else "",
        shown(score) + ("" if len(last) == wanted else f" ({len(last)} of {wanted} seeds)"),
        "" if other is None else shown(other, sign=True),
        verdict(other, task.better),
        f"{first['trained']:,}",
        _ratio(last, lora) if trains else "",
        _kept(first) if trains else "",
        _mean(last, "source"),
        _mean(last, "source_off"),
        _trials(task, tuned) if trains else "",
    )
    return Row(method, label, score, other, _by_seed(last), cells)


def _trials(task: Task, tuned: Choice) -> str:
    if task.rates_of:
        return f"of {task.rates_of}"
    return f"{len(tuned.tried)}{'' if tuned.inside else ', edge'}"


def _by_seed(runs: dict[int, Found]) -> dict[int, float]:
    return {seed: run["test"] for seed, run in runs.items()}


def verdict(found: Interval | None, better: str) -> str:
    """What a difference says, in a word."""
    beyond = exceeds_noise(found)
    if beyond is None:
        return "" if found is None else "one seed"
    if not beyond:
        return "no"
    assert found is not None
    return "better" if (found.mean > 0) == (better == "max") else "worse"


def shown(found: Interval, sign: bool = False) -> str:
    middle = f"{found.mean:+.1f}" if sign else f"{found.mean:.1f}"
    return middle if math.isinf(found.low) else f"{middle} ± {found.half:.1f}"


def markdown(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, tuple("---" for _ in head), *lines))


def _about(task: Task) -> str:
    sense = "less is better" if task.better == "min" else "more is better"
    count = len(task.budget.seeds)
    seeds = f"{count} seed{'s' * (count > 1)}"
    return f"`{' '.join(task.words)}`: test/{task.score} in %, {sense}; {seeds}."


def _ratio(own: dict[int, Found], lora: dict[int, Found]) -> str:
    ratios = [
        own[seed]["cpu_seconds"] / lora[seed]["cpu_seconds"]
        for seed in own.keys() & lora.keys()
        if lora[seed]["cpu_seconds"]
    ]
    return f"{median(ratios):.2f}" if ratios else ""


def _kept(run: Found) -> str:
    """Of a fit in this process; the application's commands don't tell."""
    return f"{(run['saved_bytes'] + run['state_bytes']) / MIB:.1f}" if "saved_bytes" in run else ""


def _mean(runs: dict[int, Found], name: str) -> str:
    values = [run[name] for run in runs.values() if run.get(name) is not None]
    return f"{sum(values) / len(values):.1f}" if values else ""


def _totals(runs: list[Found]) -> str:
    done = [run for run in runs if "refused" not in run]
    hours = sum(run["cpu_seconds"] for run in done) / 3600
    return f"{len(done)} runs, {hours:.1f} CPU hours of fitting."
