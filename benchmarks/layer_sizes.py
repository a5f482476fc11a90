"""One adapted layer of every size against PEFT's: on none is ours to be slower.

    python -m benchmarks.layer_sizes [--kind linear|conv] [--rounds 15] [--clock cpu] [--check]

Widths times tokens (of a convolution channels times pixels), float32, rank 8, one thread; forward without
gradients, and forward and backward with one for the input. The ways run in turn, round after round; reported
is the median over the rounds of the time relative to PEFT's in the same round, of the rule ("auto"), of the
function alone ("keep_inputs") and of plain operations alone ("reference"). The clock is the thread's own time
on the processor, so that what else runs there counts less. Writes benchmarks/results/layer_sizes_<kind>.json.
With --check the exit code is 1 where the rule is slower than PEFT by more than 3 %.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lightning as ll
from benchmarks import measure
from lora_lightning.utils.progress import working

RESULTS = Path(__file__).parent / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
WAYS = ("auto", "keep_inputs", "reference")
# widths and tokens; channels, and pixels a side of 4 images
SIZES = {
    "linear": ((16, 64, 256, 768, 1536, 4096), (1, 16, 64, 256, 1024, 8192)),
    "conv": ((8, 32, 128, 512), (1, 4, 8, 16, 32)),
}
LARGEST = 4e9  # operations of one product
NOISE = 1.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kind", choices=SIZES, default="linear")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure.keep_memory()
    found: dict[str, Any] = {}
    for width, count in working(list(product(*SIZES[options.kind])), "measuring", "sizes"):
        make, x = CASES[options.kind](width, count)
        if operations(make(), x) > LARGEST:
            continue
        found[f"{width}x{count}"] = row = compared(make, x, options.rounds, CLOCKS[options.clock])
        print(f"{width:5} x {count:5}  " + "  ".join(map(line, row.values())), flush=True)
    result = {**measure.machine(1, "cpu"), "kind": options.kind, "rounds": options.rounds, "sizes": found}
    RESULTS.joinpath(f"layer_sizes_{options.kind}.json").write_text(json.dumps(result, indent=1) + "\n")
    slower = [
        f"{size} {name}: {row['auto']['ratio']:.2f}"
        for size, rows in found.items()
        for name, row in rows.items()
        if row["auto"]["ratio"] > NOISE
    ]
    print("slower than PEFT:", ", ".join(slower) or "nowhere")
    return int(options.check and bool(slower))


def linear(width: int, tokens: int) -> tuple[Callable[[], nn.Module], Tensor]:
    return lambda: nn.Linear(width, width), torch.randn(tokens, width)


def conv(channels: int, side: int) -> tuple[Callable[[], nn.Module], Tensor]:
    return lambda: nn.Conv2d(channels, channels, 3, padding=1), torch.randn(4, channels, side, side)


CASES = {"linear": linear, "conv": conv}


def operations(layer: nn.Module, x: Tensor) -> float:
    """Of the layer's own product."""
    positions = x.numel() // x.shape[1]
    return 2.0 * positions * sum(p.numel() for p in layer.parameters() if p.dim() > 1)


def compared(
    make: Callable[[], nn.Module], x: Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, dict[str, float]]]:
    """For "forward" and "step", of each way its milliseconds and the ratio to PEFT's."""
    torch.manual_seed(0)
    base = make()
    layers = {"peft": with_peft(base), **{way: with_ours(base, way) for way in WAYS}}
    x.requires_grad_()
    dY = torch.randn_like(base(x))
    repeats = max(1, int(1e-2 * 3e10 / (operations(base, x) * 3 + 1e7)))

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(repeats):
                layer(x)

    def step(layer: nn.Module) -> None:
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
        for _ in range(repeats):
            for tensor in trained:
                tensor.grad = None
            layer(x).backward(dY)

    found = {}
    for name, run in {"forward": forward, "step": step}.items():
        ways = {way: lambda layer=layer, run=run: run(layer) for way, layer in layers.items()}  # type: ignore[misc]  # mypy takes no defaults
        times = measure.interleaved(ways, rounds, clock=clock)
        rows = measure.ratios({way: [t / repeats for t in seconds] for way, seconds in times.items()}, "peft")
        found[name] = {way: {k: float(f"{v:.4g}") for k, v in row.items()} for way, row in rows.items()}
    return found


def with_peft(base: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        nn.Sequential(copy.deepcopy(base)), LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
    )
    return filled(model.base_model.model[0])


def with_ours(base: nn.Module, implementation: str) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(base))
    ll.inject(
        model,
        ll.LoRAConfig(rank=8, target_modules=["0"], modules_to_save=None, implementation=implementation),
    )
    return filled(model[0])


def filled(layer: nn.Module) -> nn.Module:
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return layer


def line(row: dict[str, dict[str, float]]) -> str:
    return " ".join(f"{way} {v['ms']:8.3f} ({v['ratio']:.2f})" for way, v in row.items())


if __name__ == "__main__":
    sys.exit(main())
