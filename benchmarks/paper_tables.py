"""The tables of `benchmarks.on_paper`: of one run for the terminal, of all of them as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.models import WAYS

RESULTS = Path(__file__).parent / "results"


def table(ways: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{'':12s} {'calls':>6s} {'kernels':>7s} {'GB':>7s} {'copied':>6s} {'TFLOP':>6s} {'saved GiB':>9s}"
        f" {'ms':>7s} {'/ floor':>7s}  ms of the heaviest operators"
    ]
    for way, row in ways.items():
        top = ", ".join(f"{name} {of['ms']:.1f}" for name, of in row["top"].items())
        lines.append(
            f"{way:12s} {row['calls']:6d} {row['launches']:7d} {row['gb']:7.1f} {row['copied_gb']:6.1f}"
            f" {row['tflop']:6.2f} {row['saved_gib']:9.2f} {row['ms']:7.2f} {row['ratio']:7.2f}  {top}"
        )
    return "\n".join(lines)


def host_table(ways: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{'':12s} {'operators':>9s} {'graph nodes':>11s} {'of Python':>9s} {'Python calls':>12s}"
        f" {'ours':>6s} {'torch':>6s}"
    ]
    for way, row in ways.items():
        lines.append(
            f"{way:12s} {row['calls']:9d} {row['nodes']:11d} {row['python_nodes']:9d}"
            f" {row['python_calls']:12d} {row['own_calls']:6d} {row['torch_calls']:6d}"
        )
    return "\n".join(lines)


def summary() -> str:
    """A page of every result that is there, in Markdown."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("on_paper_*.json"))]
    lines = ["# Training steps on a GPU, on paper", "", *WORDS, "", *_overview(found)]
    for run in found:
        lines += ["", f"## {title(run)}", "", HEAD, RULE]
        lines += [_row(way, row) for way, row in run["ways"].items()]
    return "\n".join(lines) + "\n"


WORDS = (
    "Counted on the meta device, not measured: `python -m benchmarks.on_paper`, whose docstring says what",
    "is assumed. Calls are operators, kernels what they launch, GB what they move, copies among it; the",
    "time is the kernels' on the device, without the host. First of each way: time / floor; calls; bytes",
    "saved for the backward / floor's.",
)


def _overview(found: list[dict[str, Any]]) -> list[str]:
    """A line for each setting, a column for each way."""
    ways = [way for way in WAYS if any(way in run["ways"] for run in found)]
    lines = [f"| | {' | '.join(ways)} |", "| --- |" + " ---: |" * len(ways)]
    for run in found:
        saved = run["ways"]["floor"]["saved_gib"]
        cells = [
            f"{row['ratio']:.2f}; {row['calls']:,}; {row['saved_gib'] / saved:.2f}" if row else ""
            for row in (run["ways"].get(way) for way in ways)
        ]
        lines.append(f"| {title(run)} | {' | '.join(cells)} |")
    return lines


HEAD = "| | calls | kernels | GB | of it copies | TFLOP | saved GiB | ms | / floor | heaviest, ms |"
RULE = "| --- |" + " ---: |" * 8 + " --- |"


def title(run: dict[str, Any]) -> str:
    extra = [f"dropout {run['dropout']:g}"] if run["dropout"] else []
    extra += ["DoRA"] if run["dora"] else []
    parts = [f"{run['model']}, batch {run['batch']}", run["precision"], f"rank {run['rank']}", *extra]
    return ", ".join([*parts, run["device"]])


def _row(way: str, row: dict[str, Any]) -> str:
    top = ", ".join(f"{name} {of['ms']:.1f}" for name, of in list(row["top"].items())[:4])
    return (
        f"| {way} | {row['calls']:,} | {row['launches']:,} | {row['gb']:.1f} | {row['copied_gb']:.1f} |"
        f" {row['tflop']:.2f} | {row['saved_gib']:.2f} | {row['ms']:.2f} | {row['ratio']:.2f} | {top} |"
    )
