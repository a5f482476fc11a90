"""Charts of a page of results, as SVG within the page, whose colours they take, in the dark and on paper."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lora_lightning.report.page import text

WRITTEN = 16  # classes up to which each cell of a confusion matrix shows its number
POINTS = 1500  # of a scatter
Number = float | None


def svg(width: float, height: float, parts: Sequence[str], label: str, widest: str, least: float = 0) -> str:
    """A figure that shrinks with the screen to `least` pixels, below which it scrolls.

    Args:
        label: what it shows, for those who cannot see it.
        widest: as CSS has it.
    """
    style = f"max-width:{widest}" + (f";min-width:{least:g}px" if least else "")
    return (
        f'<div class="wide"><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text(label)}" '
        f'style="{style}">{"".join(parts)}</svg></div>'
    )


def confusion(counts: np.ndarray, names: Sequence[str], label: str) -> str:
    """A confusion matrix: a row a true class, a column a predicted one, shaded by the share of the row.

    Args:
        counts: (classes, classes).
    """
    number = len(names)
    cell = 24 if number <= WRITTEN else 14
    letters = max(3, min(12, max(len(name) for name in names)))
    margin = 8 + 7 * letters
    size = margin + cell * number
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    parts = []
    for i, name in enumerate(names):
        middle = margin + cell * (i + 0.5)
        shown = text(name, letters)
        parts.append(f'<text x="{margin - 4:.1f}" y="{middle + 4:.1f}" text-anchor="end">{shown}</text>')
        at = f"{middle + 4:.1f} {margin - 5:.1f}"
        parts.append(f'<text transform="translate({at}) rotate(-90)">{shown}</text>')
    for i, j in zip(*np.nonzero(counts), strict=True):
        x, y, share = margin + cell * j, margin + cell * i, shares[i, j]
        meaning = f"{text(names[i])} → {text(names[j])}: {counts[i, j]} ({100 * share:.0f} %)"
        shade = f"fill:rgb(var(--heat));fill-opacity:{0.08 + 0.87 * share:.2f}"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1}" height="{cell - 1}" style="{shade}">'
            f"<title>{meaning}</title></rect>"
        )
        if number <= WRITTEN:
            ink = ";fill:var(--ground)" if share > 0.6 else ""
            parts.append(
                f'<text x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" '
                f'style="text-anchor:middle;font-size:{9 if counts[i, j] < 1000 else 7}px{ink}">'
                f"{counts[i, j]}</text>"
            )
    return svg(size + 2, size + 2, parts, label, f"{1.4 * size:.0f}px", min(size, 10 * number + margin))


def class_bars(
    rows: Sequence[tuple[str, Sequence[tuple[Number, Sequence[float], Number]]]], titles: Sequence[str]
) -> str:
    """A row a class: for each title a bar from 0 to 1, its interval, and a mark where it was before.

    Args:
        rows: name, and for each title the value, its interval (empty without one) and the value before.
    """
    left, bar, step = 96, 116, 20
    width = left + len(titles) * (bar + 12)
    parts = [
        f'<text x="{left + i * (bar + 12)}" y="12" style="font-weight:600">{text(title)}</text>'
        for i, title in enumerate(titles)
    ]
    for row, (name, values) in enumerate(rows):
        y = 22 + row * step
        shown = f"{text(name, 12)}<title>{text(name)}</title>"
        parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{shown}</text>')
        for i, (value, interval, before) in enumerate(values):
            x = left + i * (bar + 12)
            parts.append(f'<rect x="{x}" y="{y + 2}" width="{bar}" height="11" style="fill:var(--line)"/>')
            if value is None:
                parts.append(f'<text x="{x + 4}" y="{y + 11}">–</text>')
                continue
            parts.append(
                f'<rect x="{x}" y="{y + 2}" width="{bar * value:.1f}" height="11" style="fill:var(--now)">'
                f"<title>{100 * value:.1f} %</title></rect>"
            )
            if len(interval):
                low, high = (x + bar * float(v) for v in interval)
                parts.append(_line(low, y + 7.5, high, y + 7.5, "stroke:var(--ink);stroke-width:1.5"))
            if before is not None:
                at = x + bar * before
                parts.append(_line(at, y, at, y + 15, "stroke:var(--bad);stroke-width:2"))
    return svg(width, 24 + step * len(rows), parts, "per class: " + ", ".join(titles), "34rem", 300)


def reliability(shares: np.ndarray, sure: np.ndarray, counts: np.ndarray, label: str) -> str:
    """How often a prediction is right, by how sure the model is of it; below, how many there are.

    Args:
        shares, sure: (bins,), the share that is right and the mean confidence; NaN of an empty bin.
        counts: (bins,).
    """
    left, top, side, foot = 34, 8, 220, 46
    bins = len(counts)
    parts = [_axis(left, top, side)]
    for i in range(bins):
        x, wide = left + side * i / bins, side / bins - 1
        if counts[i]:
            tall = side * shares[i]
            gap = f"sure {100 * sure[i]:.0f} %, right {100 * shares[i]:.0f} % of {counts[i]:.0f}"
            parts.append(
                f'<rect x="{x:.1f}" y="{top + side - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                f'style="fill:var(--now)"><title>{gap}</title></rect>'
            )
            expected = top + side * (1 - sure[i])
            parts.append(_line(x, expected, x + wide, expected, "stroke:var(--bad);stroke-width:2"))
            high = foot * counts[i] / counts.max() - 8 * counts[i] / counts.max()
            base = top + side + 22 + foot
            parts.append(
                f'<rect x="{x:.1f}" y="{base - high:.1f}" width="{wide:.1f}" height="{high:.1f}" '
                f'style="fill:var(--then)"/>'
            )
    parts.append(_line(left, top + side, left + side, top, "stroke:var(--soft);stroke-dasharray:4 3"))
    return svg(left + side + 10, top + side + foot + 26, parts, label, "20rem")


def scatter(truths: np.ndarray, found: np.ndarray, before: np.ndarray | None, label: str) -> str:
    """Predicted numbers over true ones, those of before behind; at most 1,500 of each, evenly chosen."""
    left, top, side = 52, 8, 260
    chosen = np.linspace(0, len(truths) - 1, min(POINTS, len(truths))).round().astype(int)
    low, high = float(min(truths.min(), found.min())), float(max(truths.max(), found.max()))
    span = (high - low) or 1.0
    parts = [
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" style="fill:none;stroke:var(--line)"/>'
    ]
    for value in (low, (low + high) / 2, high):
        at = side * (value - low) / span
        shown = f"{value:.3g}"
        parts.append(f'<text x="{left - 4}" y="{top + side - at + 4:.1f}" text-anchor="end">{shown}</text>')
        parts.append(f'<text x="{left + at:.1f}" y="{top + side + 14}" text-anchor="middle">{shown}</text>')
    parts.append(_line(left, top + side, left + side, top, "stroke:var(--soft);stroke-dasharray:4 3"))
    for values, colour in ((before, "--then"), (found, "--now")):
        if values is None:
            continue
        for i in chosen:
            x, y = (side * min(1.0, max(0.0, (v - low) / span)) for v in (truths[i], values[i]))
            parts.append(
                f'<circle cx="{left + x:.1f}" cy="{top + side - y:.1f}" r="2" style="fill:var({colour})"/>'
            )
    return svg(left + side + 14, top + side + 20, parts, label, "30rem")


def _axis(left: float, top: float, side: float) -> str:
    parts = [
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" style="fill:none;stroke:var(--line)"/>'
    ]
    for share in (0, 0.5, 1):
        x, y, shown = left + side * share, top + side * (1 - share) + 4, f"{100 * share:.0f}"
        parts.append(f'<text x="{left - 4}" y="{y}" text-anchor="end">{shown}</text>')
        parts.append(f'<text x="{x}" y="{top + side + 14}" text-anchor="middle">{shown}</text>')
    return "".join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="{style}"/>'
