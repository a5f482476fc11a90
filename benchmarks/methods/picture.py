"""The picture of a suite: a panel a task, a line a method, its mean and interval over the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.methods.report import Row
    from benchmarks.methods.suites import Task

OWN, OTHER = "#2a6f97", "#8d99ae"


def draw(found: Mapping[Task, Sequence[Row]], path: Path) -> None:
    """Write it as PNG; nothing where nothing was tested."""
    panels = {task: [r for r in rows if r.score and r.name != "before"] for task, rows in found.items()}
    panels = {task: rows for task, rows in panels.items() if rows}
    if not panels:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    several = [*panels.items()]
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


def draw_curves(found: Mapping[Task, Sequence[Row]], path: Path) -> None:
    """The few-shot curves: of each method the score by how much it was trained on, if two are there."""
    curves: dict[str, dict[str, list[tuple[float, Row]]]] = {}
    for task, rows in found.items():
        for row in rows if task.curve else ():
            if task.curve and row.score and row.name != "before":
                points = curves.setdefault(task.curve[0], {}).setdefault(row.label, [])
                points.append((task.curve[1], row))
    curves = {name: of for name, of in curves.items() if any(len(points) > 1 for points in of.values())}
    if not curves:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2), squeeze=False)
    for axis, (name, methods) in zip(axes[0], curves.items(), strict=True):
        for label, points in methods.items():
            points.sort(key=lambda point: point[0])
            scores = [row.score for _, row in points if row.score]
            half = [0.0 if math.isinf(s.low) else s.half for s in scores]
            axis.errorbar(
                [x for x, _ in points], [s.mean for s in scores], half, marker="o", capsize=2, label=label
            )
        axis.set_xscale("log")
        axis.set_xlabel(name, fontsize=8)
        axis.set_ylabel("test score, %", fontsize=8)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


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
    axis.set_xlabel(
        f"test {task.score}, % ({'less' if task.better == 'min' else 'more'} is better)", fontsize=7
    )
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", linewidth=0.3)
