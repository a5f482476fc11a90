"""What a LoRA step costs, relative to the frozen network's own forward and backward.

    python -m benchmarks.training --model vit_small --against peft,full,floor [--threads 2] [--check]

A step is forward, loss, backward and fused AdamW. All ways run in turn, round after round; reported are the
median and quartiles of the ratio to the floor of the same round, the bytes saved for the backward, and the
peak memory: that of a process of its own, or on a GPU that of its tensors. While times are taken malloc keeps
what is freed. Writes benchmarks/results/training_<model>….json and .png. With --check the exit code is 1 when
a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.models import WORKLOADS, build, loss_of

RESULTS = Path(__file__).parent / "results"
DTYPES = {"32": None, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# model -> (time / floor, saved bytes / PEFT's) that ours may not exceed
LIMITS = {
    "vit_small": (1.10, 0.66),
    "resnet50": (1.20, 0.65),
    "wav2vec2_base": (1.08, None),
    "lstm": (1.05, None),
}
FULL_LIMITS = {"fasterrcnn_resnet50_fpn": 0.8}  # model -> time / full fine-tuning's
VARIANT_LIMIT = 0.7  # of PEFT's own time and bytes, with dropout or DoRA
GPU_LIMITS = {"floor": 1.25, "peft": 0.75, "full": 1.0}  # way -> time / that way's


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(measure.peak_bytes(_Run(options.peak, options).step, options.device))
        return 0
    measure.keep_memory()
    runs, peaks = {}, {}
    for way in _ways(options):
        before = measure.allocated(options.device)
        runs[way] = _Run(way, options)
        if options.device == "cuda":
            peaks[way] = measure.peak_bytes(runs[way].step, "cuda") - before
    saved = {way: measure.saved_bytes(run.model, run.loss) for way, run in runs.items()}
    weights = {way: measure.weight_bytes(run.model) for way, run in runs.items()}
    steps = {way: run.step for way, run in runs.items()}
    times = measure.interleaved(steps, options.rounds, device=options.device, clock=CLOCKS[options.clock])
    del runs
    found = {
        way: {
            **row,
            "saved_mib": saved[way] / measure.MIB,
            "weights_mib": weights[way] / measure.MIB,
            "peak_mib": (peaks[way] if way in peaks else _peak(way)) / measure.MIB,
        }
        for way, row in measure.ratios(times, "floor").items()
    }
    print(_table(found))
    name = _name(options)
    result = {
        "model": options.model,
        "batch": options.batch or WORKLOADS[options.model].size,
        "precision": options.precision,
        "dropout": options.dropout,
        "dora": options.dora,
        "compile": options.compile,
        "clock": options.clock,
        "rounds": options.rounds,
        **measure.machine(options.threads, options.device),
        "ways": found,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    _draw(found, name)
    problems = _too_much(options, found)
    print("\n".join(problems) or "within the limits")
    return int(options.check and bool(problems))


class _Run:
    """One way of training the model: its step, and its loss alone."""

    def __init__(self, way: str, options: argparse.Namespace) -> None:
        workload = WORKLOADS[options.model]
        extra = {"dropout": options.dropout, "use_dora": options.dora}
        self.model: nn.Module = build(way, workload, **extra).to(options.device)
        torch.manual_seed(1)
        x, self.labels = (t.to(options.device) for t in workload.batch(options.batch or workload.size))
        if options.precision == "bf16-true":
            self.model, x = self.model.bfloat16(), x.bfloat16()
        self.x = x
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
        mixed = options.precision == "bf16-mixed"
        self.context: Callable[[], Any] = (
            (lambda: torch.autocast(options.device, torch.bfloat16)) if mixed else nullcontext
        )
        self.forward = torch.compile(self.model) if options.compile else self.model

    def loss(self) -> torch.Tensor:
        with self.context():
            return loss_of(self.forward(self.x), self.labels)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _peak(way: str) -> int:
    command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--peak", way]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[-1])


def _ways(options: argparse.Namespace) -> list[str]:
    against = [w for w in options.against.split(",") if w != "peft" or WORKLOADS[options.model].peer]
    return list(dict.fromkeys(["floor", "ours", *against]))


def _too_much(options: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """One line for each limit that ours exceeds."""
    ours, peft = found["ours"], found.get("peft")
    slowest, saved = LIMITS.get(options.model, (None, None))
    checks = []
    if options.device == "cuda":
        against = {way: limit for way, limit in GPU_LIMITS.items() if way in found}
        checks = [(f"time / {w}", ours["ratio"] / found[w]["ratio"], limit) for w, limit in against.items()]
    elif options.dropout or options.dora:
        if peft:
            checks = [
                ("time / PEFT", ours["ratio"] / peft["ratio"], VARIANT_LIMIT),
                ("saved / PEFT", ours["saved_mib"] / peft["saved_mib"], VARIANT_LIMIT),
            ]
    else:
        if slowest:
            checks.append(("time / floor", ours["ratio"], slowest))
        if options.model in FULL_LIMITS and "full" in found:
            share = ours["ratio"] / found["full"]["ratio"]
            checks.append(("time / full", share, FULL_LIMITS[options.model]))
        if saved and peft:
            checks.append(("saved / PEFT", ours["saved_mib"] / peft["saved_mib"], saved))
    return [f"{what} is {value:.3f}, allowed {limit}" for what, value, limit in checks if value > limit]


def _table(found: dict[str, Any]) -> str:
    lines = [
        f"{'':10s} {'ms':>8s} {'/ floor':>8s} {'quartiles':>13s} {'saved MiB':>10s}"
        f" {'weights MiB':>11s} {'peak MiB':>9s}"
    ]
    for way, row in found.items():
        lines.append(
            f"{way:10s} {row['ms']:8.1f} {row['ratio']:8.3f} {row['low']:6.3f}-{row['high']:.3f}"
            f" {row['saved_mib']:10.1f} {row['weights_mib']:11.1f} {row['peak_mib']:9.0f}"
        )
    return "\n".join(lines)


def _draw(found: dict[str, Any], name: str) -> None:
    """Bars of time and saved bytes relative to the floor."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 0.6 + 0.45 * len(found)), layout="constrained")
    floor = found["floor"]["saved_mib"]
    for axes, title, values in (
        (panels[0], "time / floor", {w: row["ratio"] for w, row in found.items()}),
        (
            panels[1],
            "saved for the backward / floor",
            {w: row["saved_mib"] / floor for w, row in found.items()},
        ),
    ):
        bars = axes.barh(list(values), list(values.values()), color="#8fb3d9")
        for way, bar in zip(values, bars, strict=True):
            if way.startswith("ours"):
                bar.set_color("#d9552b")
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


def _name(options: argparse.Namespace) -> str:
    where = f"{options.threads}t" if options.device == "cpu" else measure.device_name("cuda")
    parts = ["training", options.model, re.sub(r"\W+", "-", where)]
    parts += [options.precision] if options.precision != "32" else []
    parts += [f"batch{options.batch}"] if options.batch else []
    parts += [f"dropout{options.dropout:g}"] if options.dropout else []
    parts += ["dora"] if options.dora else []
    parts += ["quantized"] if "_int8" in options.against or "_nf4" in options.against else []
    parts += ["compiled"] if options.compile else []
    return "_".join(parts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, required=True)
    parser.add_argument(
        "--against",
        default="peft,full,floor",
        help="of floor, full, peft, keep_inputs, reference, fused, ours_int8, ours_nf4, peft_nf4",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="default: that of the model")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: on a machine that others use too"
    )
    parser.add_argument("--precision", choices=DTYPES, default="32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a limit is exceeded")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
