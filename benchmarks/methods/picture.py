"""The picture of a suite: a panel a task, a line a method, its mean and interval over the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.methods.report import Row
    from benchmarks.methods.statistics import Interval
    from benchmarks.methods.suites import Task

OWN, OTHER = "#2a6f97", "#8d99ae"


def draw(found: Mapping[Task, Sequence[Row]], path: Path) -> None:
    """A panel a task as PNG; nothing where there is no panel."""
    several = [*panels(found).items()]
    if not several:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = [several[i : i + 2] for i in range(0, len(several), 2)]
    heights = [1.4 + 0.27 * max(len(rows) for _, rows in pair) for pair in pairs]
    figure, axes = pyplot.subplots(
        len(pairs), len(pairs[0]), figsize=(4.6 * len(pairs[0]), sum(heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (task, rows) in zip(axes.flat, several, strict=False):
        _panel(axis, task, rows)
    for axis in axes.flat[len(several) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def panels(found: Mapping[Task, Sequence[Row]]) -> dict[Task, list[Row]]:
    """The tested methods of a task, of tasks that compare several, of more seeds than one, and are not wholly
    on a curve."""
    tested = {
        task: [row for row in rows if row.score and row.name != "before"] for task, rows in found.items()
    }
    shown = curves(found)
    return {
        task: rows
        for task, rows in tested.items()
        if len(rows) > 1
        and any(not math.isinf(row.score.low) for row in rows if row.score)
        and not (task.curve and {row.label for row in rows} <= shown.get(task.curve[0], {}).keys())
    }


def draw_curves(found: Mapping[Task, Sequence[Row]], path: Path) -> None:
    """The few-shot curves as PNG; nothing where no method has two points."""
    of_curves = curves(found)
    if not of_curves:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sense = {task.curve[0]: _sense(task) for task in found if task.curve}
    figure, axes = pyplot.subplots(1, len(of_curves), figsize=(4.2 * len(of_curves), 3.4), squeeze=False)
    for axis, (name, methods) in zip(axes[0], of_curves.items(), strict=True):
        for label, points in methods.items():
            half = [0.0 if math.isinf(score.low) else score.half for _, score in points]
            at = [amount for amount, _ in points]
            axis.errorbar(at, [score.mean for _, score in points], half, marker="o", capsize=2, label=label)
        axis.set_xscale("log")
        ticks = sorted({amount for points in methods.values() for amount, _ in points})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(name, fontsize=8)
        axis.set_ylabel(sense[name], fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def curves(found: Mapping[Task, Sequence[Row]]) -> dict[str, dict[str, list[tuple[float, Interval]]]]:
    """Of each curve, of each method of two points or more: the score by how much it was trained on."""
    every: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    for task, rows in found.items():
        for row in rows:
            if task.curve and row.score and row.name != "before":
                points = every.setdefault(task.curve[0], {}).setdefault(row.label, [])
                points.append((task.curve[1], row.score))
    kept = {
        name: {label: sorted(points) for label, points in of.items() if len(points) > 1}
        for name, of in every.items()
    }
    return {name: of for name, of in kept.items() if of}


def _panel(axis: Any, task: Task, rows: Sequence[Row]) -> None:
    for place, row in enumerate(reversed(rows)):
        assert row.score is not None
        colour = OWN if row.name == "lora" else OTHER
        half = 0.0 if math.isinf(row.score.low) else row.score.half
        axis.errorbar(row.score.mean, place, xerr=half, fmt="o", color=colour, capsize=2, markersize=4)
        if row.name == "lora":
            axis.axvline(row.score.mean, color=colour, linewidth=0.7, alpha=0.5)
    axis.set_yticks(range(len(rows)), [row.label for row in reversed(rows)], fontsize=7)
    axis.set_title(task.label, fontsize=9)
    axis.set_xlabel(_sense(task), fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", linewidth=0.3)


def _sense(task: Task) -> str:
    return f"test {task.score}, % ({'less' if task.better == 'min' else 'more'} is better)"
