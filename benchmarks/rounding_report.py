"""The table and the picture of benchmarks.rounding, from its runs."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from lora_lightning.utils.tables import format_table

Runs = list[dict[str, Any]]
COLOURS = {
    "nudged": "#9a9a9a",
    "exact": "#2b2b2b",
    "branch": "#8fb3d9",
    "nearest": "#d9552b",
    "stochastic": "#3a8a5f",
    "dither": "#c79a1b",
}
LABELS = {
    "nudged": "float32, A changed by 10⁻⁶",
    "exact": "W' float32, the rest bfloat16",
    "branch": "x·Wᵀ + branch",
    "nearest": "W' to nearest",
    "stochastic": "W' stochastic",
    "dither": "W' with a dither",
}
SMOOTH = 10  # steps over which the picture's differences are averaged


def settings_of(runs: Runs) -> list[tuple[str, str, float]]:
    """Task, precision and fraction of the rate, in the order of the runs."""
    found = {(r["task"], r["precision"], r["factor"]): None for r in runs if r["way"] != "before"}
    return sorted(found, key=lambda s: (s[1] == "bf16-mixed", s[0] == "accents", -s[2]))


def pairs_of(runs: Runs, setting: tuple[str, str, float]) -> dict[str, list[tuple[Any, Any, Any]]]:
    """For each way, a seed at a time: its run, float32's, and the model before training."""
    by = {(r["task"], r["precision"], r["factor"], r["way"], r["seed"]): r for r in runs}
    task, precision, _ = setting
    found: dict[str, list[tuple[Any, Any, Any]]] = {}
    for (*of, way, seed), run in by.items():
        reference = by.get((*setting, "float32", seed))
        if tuple(of) == setting and way not in ("float32", "before") and reference:
            before = by[task, precision, 1.0, "before", 0]
            found.setdefault(way, []).append((run, reference, before))
    return found


def summary(runs: Runs) -> list[dict[str, Any]]:
    """A row for each setting and way; each number is (median, least, largest) over the seeds.

    loss: mean over the steps of |training loss - float32's|.
    learned: how much of the validation loss the factors take away, computed in float32, as a share of what
        float32's factors take away.
    applied: the same with the loss computed by this way.
    validation: the validation loss as this way computes it, less float32's.
    score: the same of the score, in percent points.
    size: of float32's updates in the end, the median in units of W's last place.
    """
    rows = []
    for task, precision, factor in settings_of(runs):
        for way, pairs in pairs_of(runs, (task, precision, factor)).items():
            row: dict[str, Any] = {"task": task, "precision": precision, "factor": factor, "way": way}
            row["seeds"] = len(pairs)
            row["size"] = median(reference["size"] for _, reference, _ in pairs)
            row["loss"] = _spread([_apart(run, reference) for run, reference, _ in pairs])
            for name, value in (("learned", "learned"), ("applied", "validation")):
                row[name] = _spread([_share(value, *pair) for pair in pairs])
            for place, name in enumerate(("validation", "score")):
                row[name] = _spread([r["validation"][place] - f["validation"][place] for r, f, _ in pairs])
            rows.append(row)
    return rows


def _apart(run: Any, reference: Any) -> float:
    return float(np.abs(np.subtract(run["losses"], reference["losses"])).mean())


def _share(value: str, run: Any, reference: Any, before: Any) -> float:
    return (before[value][0] - run[value][0]) / (before["learned"][0] - reference["learned"][0])


def _spread(values: list[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def table(runs: Runs) -> str:
    """The summary as text."""
    head = ("task", "precision", "rate", "size", "way", "seeds", "|loss - f32| e-3", "learned %",
            "applied %", "validation e-3", "score")  # fmt: skip
    lines = []
    for r in summary(runs):
        cells = [
            _text(r["loss"], 1e3),
            _text(r["learned"], 100),
            _text(r["applied"], 100),
            _text(r["validation"], 1e3),
            _text(r["score"]),
        ]
        lines.append(
            (r["task"], r["precision"], f"{r['factor']:g}", f"{r['size']:.2g}", r["way"], r["seeds"], *cells)
        )
    return format_table(head, lines)


def survival_table(rows: Runs) -> str:
    """What is left of an update in the weight and in the outputs, and the outputs' error, by its size."""
    sizes = sorted({row["size"] for row in rows})
    by = {(row["case"], row["size"]): row for row in rows}
    lines = [
        (case, what, *(f"{by[case, size][what]:.2f}" for size in sizes))
        for what in ("weight", "output", "error")
        for case in dict.fromkeys(row["case"] for row in rows)
    ]
    return format_table(("way", "", *(f"{size:g}" for size in sizes)), lines)


def _text(spread: tuple[float, float, float], times: float = 1.0) -> str:
    middle, low, high = (times * value for value in spread)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def draw(runs: Runs, path: Path) -> None:
    """Training loss less float32's by step, a panel a setting: medians over the seeds of running means."""
    figure, grid = plt.subplots(3, 4, figsize=(13, 8.6), layout="constrained")
    rows = (("digits", "bf16-true"), ("accents", "bf16-true"), ("", "bf16-mixed"))
    for number, (task, precision) in enumerate(rows):
        wanted = [s for s in settings_of(runs) if s[0].startswith(task) and s[1] == precision]
        for axes, setting in zip(grid[number], wanted, strict=False):
            _panel(axes, setting, pairs_of(runs, setting))
        for axes in grid[number, len(wanted) :]:
            axes.axis("off")
    handles = [plt.Line2D([], [], color=c, linewidth=1.8) for c in COLOURS.values()]
    grid[1, 3].legend(handles, LABELS.values(), loc="center", frameon=False)
    figure.supylabel(f"training loss less float32's, × 1000: mean of {SMOOTH} steps, median of the seeds")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(axes: Any, setting: tuple[str, str, float], pairs: dict[str, list[tuple[Any, Any, Any]]]) -> None:
    task, precision, factor = setting
    for way, found in pairs.items():
        differences = np.array([np.subtract(run["losses"], ref["losses"]) for run, ref, _ in found])
        means = np.array([np.convolve(d, np.ones(SMOOTH) / SMOOTH, "valid") for d in differences])
        steps = np.arange(means.shape[1]) + SMOOTH / 2
        axes.plot(steps, 1000 * np.median(means, axis=0), color=COLOURS[way], linewidth=1.4)
    size = median(reference["size"] for found in pairs.values() for _, reference, _ in found)
    axes.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_title(f"{task}, {precision}, rate × {factor:g}\nupdates end at {size:.2g} units", fontsize=10)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
