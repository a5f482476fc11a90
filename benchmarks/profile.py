"""Where the extra time of a LoRA step goes, layer by layer.

    python -m benchmarks.profile --model vit_small [--threads 2] [--dora] [--implementation reference]

Each adapted layer runs alone, forward and backward, on the input that it has in the model, with its update
and without. Layers are summed by their names, numbers left out, those with the most extra time first.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.models import WORKLOADS, build
from benchmarks.training import CLOCKS
from lora_lightning.layers.registry import LoRALayer, lora_layers


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    workload = WORKLOADS[options.model]
    model = build(
        "ours",
        workload,
        use_dora=options.dora,
        dropout=options.dropout,
        implementation=options.implementation,
    )
    model = model.to(options.device)
    x = workload.batch(options.batch or workload.size)[0].to(options.device)
    inputs, _graph = _inputs(model, x)
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
    for name, layer in lora_layers(model).items():
        found = _times(layer, inputs[name], options)
        row = rows[re.sub(r"\d+", "*", name)]
        row[:] = [a + b for a, b in zip(row, (1, *found), strict=True)]
    print(f"{'ms':44s} {'layers':>6s} {'forward':>16s} {'backward':>16s} {'extra':>7s} {'ratio':>6s}")
    for name, (count, f0, b0, f1, b1) in sorted(rows.items(), key=lambda item: _extra(item[1]), reverse=True):
        print(
            f"{name:44s} {count:6.0f} {f0:7.1f} ->{f1:7.1f} {b0:7.1f} ->{b1:7.1f} {f1 + b1 - f0 - b0:7.1f}"
            f" {(f1 + b1) / (f0 + b0):6.3f}"
        )
    base, ours = (sum(r[i] + r[i + 1] for r in rows.values()) for i in (1, 3))
    print(f"all layers: {base:.1f} ms without updates, {ours:.1f} with: {ours / base:.3f}")


def _inputs(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What each adapted layer is called with, in a graph that stays alive with the output."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, _layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[name] = given[0]

    hooks = [
        layer.register_forward_pre_hook(partial(keep, name)) for name, layer in lora_layers(model).items()
    ]
    output = model(x)
    for hook in hooks:
        hook.remove()
    return inputs, output


def _times(layer: LoRALayer, x: Tensor, options: argparse.Namespace) -> tuple[float, float, float, float]:
    """Milliseconds of forward and backward, without and with the update: the least of the rounds."""
    x = x if x.requires_grad else x.requires_grad_()
    active, best = layer.lora_active, [float("inf")] * 4
    for _ in range(options.rounds):
        for place, adapters in ((0, ()), (2, active)):
            layer.lora_active = adapters
            trained = [p for p in layer.lora.parameters() if adapters]
            made: list[Tensor] = []
            steps = {
                "forward": lambda made=made: made.append(layer(x)),
                "backward": lambda made=made, trained=trained: torch.autograd.grad(
                    made[-1], [x, *trained], torch.ones_like(made[-1])
                ),
            }
            found = measure.interleaved(steps, 1, 1, options.device, CLOCKS[options.clock])
            best[place] = min(best[place], 1e3 * found["forward"][0])
            best[place + 1] = min(best[place + 1], 1e3 * found["backward"][0])
    layer.lora_active = active
    return best[0], best[1], best[2], best[3]


def _extra(row: list[float]) -> float:
    return row[3] + row[4] - row[1] - row[2]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=[n for n, w in WORKLOADS.items() if w.peer], required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="default: that of the model")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--implementation", default="auto", help="auto, keep_inputs or reference")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    return parser.parse_args()


if __name__ == "__main__":
    main()
