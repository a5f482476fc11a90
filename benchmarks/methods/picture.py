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

    tallest = max(map(len, panels.values()))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 1.4 + 0.27 * tallest), squeeze=False
    )
    for axis, (task, rows) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, task, rows)
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
