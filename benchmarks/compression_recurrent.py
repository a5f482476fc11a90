"""What compression does to LSTMs: time of 5 × 512 by the share of its parameters, beside int8 and bfloat16;
and a real speaker encoder, 3 × 256, against its own embeddings.

    python -m benchmarks.compression_recurrent           all, into benchmarks/results
    python -m benchmarks.compression_recurrent --speed   the first alone; or --int8, --voices
    python -m benchmarks.compression_recurrent --table   what is there

One thread; every round runs every model once, and a number is the median over the rounds of the dense model's
time by a model's: above 1 is faster. Of int8 the dense model is torch's, beside files of onnxruntime, in the
processor's time. The speaker encoder is `benchmarks.compression_voices`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lightning as ll
from benchmarks.compression_voices import cells_of_bits, cells_of_voices, voices
from benchmarks.measure import interleaved, machine, ratios
from lora_lightning.exporting.onnx import load
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results" / "compression_recurrent.json"
SHAPES = {(1, 10): 30, (16, 200): 5, (1, 200): 10}  # (batch, frames) -> rounds
INT8_SHAPES = {(1, 10): 30, (16, 200): 3, (1, 200): 7}
SHARES = {"1/2": 1 / 2, "1/3": 1 / 3}


class Encoder(nn.Module):
    """An LSTM and a linear layer at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(512, 512, 5, batch_first=True), nn.Linear(512, 29)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.lstm(x)[0])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts: dict[str, Callable[[], Iterator[Any]]] = {"speed": speed, "int8": int8_files, "voices": voices}
    for name in ("table", *parts):
        parser.add_argument(f"--{name}", action="store_true")
    asked = vars(parser.parse_args())
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not asked["table"]:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="LSTM with projections")
        parts = {name: rows for name, rows in parts.items() if asked[name]} or parts
        found |= machine(1, "cpu")
        for name, rows in parts.items():
            found[name] = []
            for row in rows():
                found[name].append(row)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(found))
    print(table(found))


def int8(model: nn.Module) -> nn.Module:
    """Weights of recurrent and linear layers in 8 bits, inputs quantized as they come."""
    kinds = {nn.LSTM, nn.Linear}
    smaller: nn.Module = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    return smaller


def speed() -> Iterator[dict[str, Any]]:
    """Of every shape of the input a row."""
    torch.manual_seed(0)
    dense = Encoder().eval()
    models: dict[str, nn.Module] = {"dense": dense}
    for name, share in SHARES.items():
        models[name] = copy.deepcopy(dense)
        ll.compress(models[name], parameters=share, data=[torch.randn(1, 8, 512)], plain=True)
    models |= {f"{name}, bfloat16": copy.deepcopy(m).bfloat16() for name, m in [*models.items()]}
    models |= {"dense, int8": int8(dense), "1/3, int8": int8(models["1/3"])}
    for (batch, frames), rounds in SHAPES.items():
        x = torch.randn(batch, frames, 512)
        steps, failed = {}, {}
        for name, model in models.items():
            given = x.bfloat16() if "bfloat16" in name else x
            try:
                with torch.inference_mode():
                    model(given)
                steps[name] = partial(_run, model, given)
            except RuntimeError as error:
                failed[name] = str(error).splitlines()[0]
        times = ratios(interleaved(steps, rounds), "dense")
        row = {"batch": batch, "frames": frames, "ms": times["dense"]["ms"], "failed": failed}
        row["faster"] = {name: 1 / about["ratio"] for name, about in times.items()}
        print(json.dumps(row), flush=True)
        yield row


def int8_files() -> Iterator[dict[str, Any]]:
    """Of every shape of the input a row: int8 files that `export` writes, beside torch's int8 of the dense
    model."""
    torch.manual_seed(0)
    dense = Encoder().eval()
    models = {"1": dense} | {name: copy.deepcopy(dense) for name in SHARES}
    steps: dict[str, Callable[..., Any]] = {"torch": partial(_run, int8(dense))}
    axes, megabytes = {"x": {0: "batch", 1: "frames"}}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, model) in enumerate(models.items()):
            if name in SHARES:
                ll.compress(model, parameters=SHARES[name], data=[torch.randn(1, 8, 512)], plain=True)
            out = Path(folder) / str(number)
            told = ll.export(model, torch.randn(2, 9, 512), out, dynamic=axes, quantize="dynamic")
            steps[name], megabytes[name] = partial(_run_file, load(out)), told.bytes / 1e6
    for (batch, frames), rounds in INT8_SHAPES.items():
        x = torch.randn(batch, frames, 512)
        ways = {name: partial(step, x) for name, step in steps.items()}
        times = ratios(interleaved(ways, rounds, 1, clock=time.process_time), "torch")
        row = {"batch": batch, "frames": frames, "ms": times["torch"]["ms"], "megabytes": megabytes}
        row["faster"] = {name: 1 / about["ratio"] for name, about in times.items()}
        print(json.dumps(row), flush=True)
        yield row


def _run_file(run: Callable[[dict[str, Any]], Any], x: Tensor) -> Any:
    return run({"x": x.numpy()})


@torch.inference_mode()
def _run(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found


def table(found: dict[str, Any]) -> str:
    """As docs/compression.md shows it."""
    texts = []
    if rows := found.get("speed"):
        names = list(dict.fromkeys(n for row in rows for n in [*row["faster"], *row["failed"]]))
        header = ["", *(f"{row['batch']} × {row['frames']} frames" for row in rows)]
        cells = [[n, *(_faster(row, n) for row in rows)] for n in names]
        texts.append(format_table(header, cells))
    if rows := found.get("int8"):
        header = ["int8", "MB", *(f"{row['batch']} × {row['frames']} frames" for row in rows)]
        sizes = rows[0]["megabytes"]
        cells = [
            [n, f"{sizes[n]:.1f}" if n in sizes else "", *(_faster(row, n) for row in rows)]
            for n in rows[0]["faster"]
        ]
        texts.append(format_table(header, cells))
    if rows := found.get("voices"):
        texts += [format_table(*cells(rows[0])) for cells in (cells_of_voices, cells_of_bits)]
    return "\n\n".join(texts) + "\n"


def _faster(row: dict[str, Any], name: str) -> str:
    return f"{row['faster'][name]:.2f}" if name in row["faster"] else "fails"


if __name__ == "__main__":
    main()
