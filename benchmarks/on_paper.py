"""What a training step costs on a GPU, on paper: no GPU is needed, and nothing is timed.

    python -m benchmarks.on_paper --model vit_base [--batch 128] [--device H100] [--host] [--check]
    python -m benchmarks.on_paper --check           # every setting that has limits

Forward, loss and backward run on the meta device, where operators have shapes and no data, and each operator
is counted: calls, kernels, bytes, FLOPs, and from them its time on the device (`paper_cost`). Writes
benchmarks/results/on_paper_<model>_<batch>….json, and on_paper.md of all that are there. With --check the
exit code is 1 when a limit (`paper_limits`) is exceeded. With --host the calls of Python functions and the
nodes of the autograd graph are counted too (`paper_host`).

What is assumed:

- Operators run one after another, in eager mode. Each reads its inputs and writes its results once; nothing
  stays in a cache from one to the next. Where one operator's result lies in cache (50 MB on an H100), the
  next is faster; so a ratio to the floor is wrong in small layers in either direction.
- A kernel reaches the device's rates whatever its shape, and takes 2.5 µs at least. So thin products (rank 8)
  and reductions are as good as wide ones, which no library promises.
- Time on the host is not in the time: about 5 µs an operator and 50 µs a Python autograd function, which
  decides where kernels are shorter than that. `calls` is the number to look at there.
- What a CUDA kernel copies or reads twice out of sight is counted where torch's source shows it
  (`paper_rules`); cuBLAS's and cuDNN's own workspaces and changes of layout inside are not known and not
  counted.
- Attention is the kernel that CUDA takes: flash attention in half precision without a mask, else the
  memory-efficient. An LSTM is cuDNN's: one operator, a kernel each layer and time step at least, since they
  wait for each other; it keeps six states a unit for the backward.
- The optimizer is left out: it is the same in every way but for the full one, which has more to update.
- PEFT leaves frozen batch norms in train mode, as its users have it.
- With `bf16-true` the whole model is in bfloat16 but for ours' A and B. With `bf16-mixed` it is in float32,
  and the casts are counted that CUDA's autocast makes (`paper_autocast`).
- A fused operator is the kernels that it launches; where x is made again in registers, instructions count too
  (`paper_fused`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.models import RANK, WAYS, WORKLOADS, build, loss_of, sounds
from benchmarks.paper_autocast import NAME, Paper
from benchmarks.paper_cost import DEVICES, Cost
from benchmarks.paper_host import host_row
from benchmarks.paper_limits import LIMITS, checked
from benchmarks.paper_stand_ins import as_on_a_gpu
from benchmarks.paper_tables import RESULTS, host_table, summary, table, title

GIB = 2**30
TOP = 6  # operators that are named
PRECISIONS = ("bf16-true", "bf16-mixed", "32")
SIZES = {"vit_small": 128, "vit_base": 128, "swin_tiny": 128, "resnet50": 256, "lstm": 32}  # others: 16
BY_VALUES = ("fasterrcnn_resnet50_fpn",)  # what it runs depends on numbers, which are not there
SETTINGS = ("model", "batch", "device", "precision", "rank", "dropout", "dora")
BATCHES: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    name: partial(sounds, seconds=10) for name in ("wav2vec2_base", "wav2vec2_large")
}


def main() -> int:
    options = _options()
    given = vars(options)
    runs = (
        [options] if options.model else [argparse.Namespace(**{**given, **key._asdict()}) for key in LIMITS]
    )
    with as_on_a_gpu():
        failed = [run_of(each) for each in runs]
    (RESULTS / "on_paper.md").write_text(summary())
    return int(options.check and any(failed))


def run_of(options: argparse.Namespace) -> bool:
    """Counts, prints and writes every way of one setting; whether a limit is exceeded."""
    options.batch = options.batch or SIZES.get(options.model, 16)
    found = {way: counted(way, options) for way in ways(options.model)}
    for row in found.values():
        row["ratio"] = row["ms"] / found["floor"]["ms"]
    settings = {key: getattr(options, key) for key in SETTINGS}
    result = {**settings, "torch": torch.__version__, "ways": found}
    (RESULTS / f"{_name(options)}.json").write_text(json.dumps(result, indent=1) + "\n")
    text, failed = checked(result)
    tables = [title(result), table(found), *([host_table(found)] if options.host else []), text]
    print("\n\n".join(tables), end="\n\n", flush=True)
    return failed


def ways(model: str) -> list[str]:
    """Those that the model and this version of the package have."""
    missing = [] if WORKLOADS[model].peer else ["peft"]
    missing += [] if "resnet" in model else ["folded"]  # where there are batch norms
    missing += [] if find_spec("triton") else ["fused"]  # whose kernels' sizes its cost is taken from
    return [way for way in WAYS if way not in missing]


@cache
def paper() -> Paper:
    """The device for `bf16-mixed`, made when it is first asked for."""
    return Paper()


def counted(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way's row: the sums of a step, and the bytes that its forward saves for the backward."""
    model, loss = prepared(way, options)
    saved = measure.saved_bytes(model, loss)
    loss().backward()  # what the first step alone does is not counted
    model.zero_grad()
    with Cost(DEVICES[options.device]) as cost:
        loss().backward()
    host = host_row(loss) if options.host else {}
    total = cost.total
    heaviest = sorted(cost.by.items(), key=lambda item: -item[1].seconds)[:TOP]
    return {
        "calls": total.calls, "launches": total.launches, "gb": total.bytes / 1e9,
        "tflop": total.flops / 1e12, "saved_gib": saved / GIB, "ms": 1e3 * total.seconds,
        "copied_gb": cost.copies.total() / 1e9, **host,
        "top": {n: {"ms": 1e3 * of.seconds, "calls": of.calls, "gb": of.bytes / 1e9} for n, of in heaviest},
    }  # fmt: skip


def prepared(way: str, options: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model on a device without data, and forward with loss."""
    workload = WORKLOADS[options.model]
    model = build(way, workload, rank=options.rank, dropout=options.dropout, use_dora=options.dora).to("meta")
    mixed = paper() if options.precision == "bf16-mixed" else None
    if mixed:
        model = mixed.move(model)
    with torch.device(NAME if mixed else "meta"):
        x, labels = BATCHES.get(options.model, workload.batch)(options.batch)
    if options.precision == "bf16-true":
        model, x = model.bfloat16(), x.bfloat16()

    def loss() -> Tensor:
        with mixed.autocast() if mixed else nullcontext():
            return loss_of(model(x), labels)

    return model, loss


def _name(options: argparse.Namespace) -> str:
    parts = ["on_paper", options.model, str(options.batch)]
    parts += [options.device] if options.device != "H100" else []
    parts += [options.precision] if options.precision != "bf16-true" else []
    parts += [f"rank{options.rank}"] if options.rank != RANK else []
    parts += [f"dropout{options.dropout:g}"] if options.dropout else []
    return "_".join(parts + ["dora"] * options.dora)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    models = [name for name in WORKLOADS if name not in BY_VALUES]
    parser.add_argument("--model", choices=models, help="default: every setting that has limits")
    parser.add_argument("--batch", type=int, help="default: one that fills a GPU")
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16-true")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--host", action="store_true", help="count the causes of time on the host too")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a limit is exceeded")
    options = parser.parse_args()
    if options.host and options.precision == "bf16-mixed":
        parser.error(
            "--host counts on the meta device, which has no autocast: give --precision bf16-true or 32"
        )
    if options.precision != "32" and not DEVICES[options.device].bfloat16:
        parser.error(f"--precision {options.precision}: a {options.device} has no fast bfloat16; give 32")
    return options


if __name__ == "__main__":
    sys.exit(main())
