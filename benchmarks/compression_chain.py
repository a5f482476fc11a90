"""Adapt, compress and quantize in either order, and what fine-tuning mends: the ResNet on the digits' target.

    python -m benchmarks.compression_chain          writes benchmarks/results/compression_chain.json, goes on
    python -m benchmarks.compression_chain --table  what is there

LoRA and full fine-tuning at the rates that `tune_digits` chose and for its epochs, one seed; 597 test images.
int8 is onnxruntime's, static, calibrated with 64 training images. Bytes are those of the parameters in
float32, or of the exported file.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

import lora_lightning as ll
from benchmarks.fits import quiet, trainer
from benchmarks.tune_digits import EPOCHS, classifier, prepare
from lora_lightning.data.digits import DigitsDataModule, render
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results" / "compression_chain.json"
RATES = {"lora": 8e-3, "full": 4e-3}
CALIBRATION = 64
WAYS: dict[str, tuple[str, ...]] = {
    "adapted": ("lora",),
    "adapted, compressed": ("lora", "0.5"),
    "compressed, adapted": ("0.5", "lora"),
    "fine-tuned": ("full",),
    "compressed to .35, fine-tuned": ("0.35", "full"),
    "compressed to .2, fine-tuned": ("0.2", "full"),
    "adapted, compressed, fine-tuned": ("lora", "0.5", "full"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    if not parser.parse_args().table:
        quiet()
        for row in measured({row["way"] for row in rows}):
            rows.append(row)
            print(json.dumps(row), flush=True)
            RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(table(rows))


def measured(known: set[str]) -> Iterator[dict[str, Any]]:
    """A row of each way that is not known."""
    data = DigitsDataModule("target", seed=0)
    data.setup()
    torch.manual_seed(0)
    batch = render(data.train_set.tensors[0][:256], "target")
    done: dict[tuple[str, ...], ImageClassifier] = {}
    for name, steps in WAYS.items():
        if name in known:
            continue
        module = classifier("resnet", 1e-3)
        for count, step in enumerate(steps, start=1):
            module = done.get(steps[:count]) or taken(module, step, batch)
            done[steps[:count]] = module
        network = module.model.eval()
        size = sum(4 * p.numel() for p in network.parameters())
        row = {"way": name, "score": accuracy(network, data), "bytes": size}
        yield row | int8(network, batch[:CALIBRATION], data)


def taken(module: ImageClassifier, step: str, batch: torch.Tensor) -> ImageClassifier:
    """A copy after one step: a method, or a share of the parameters."""
    L.seed_everything(0, verbose=False)
    rate = RATES.get(step, 1e-3)
    new = classifier("resnet", rate)
    new.model = copy.deepcopy(module.model)
    if step not in RATES:
        ll.compress(new.model.eval(), parameters=float(step), data=[batch])
        return new
    fitter = trainer(callbacks=prepare(new, step, None), max_epochs=EPOCHS, limit_val_batches=0)
    fitter.fit(new, datamodule=DigitsDataModule("target", seed=0))
    if step == "lora":
        ll.eject(new, merged=True)
    return new


@torch.no_grad()
def accuracy(model: nn.Module, data: DigitsDataModule) -> float:
    """Percent of the test images."""
    images, labels = data.test_set.tensors
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def int8(model: nn.Module, batch: torch.Tensor, data: DigitsDataModule) -> dict[str, float]:
    """Accuracy and bytes of the exported file."""
    import onnxruntime

    images, labels = data.test_set.tensors
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8"
        told = ll.export(model, batch[:2], out, quantize="static", calibration=[*batch.split(8)])
        session = onnxruntime.InferenceSession(out / told.file, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        found = np.concatenate([session.run(None, {name: part.numpy()})[0] for part in images.split(64)])
        return {
            "int8": 100 * float((found.argmax(1) == labels.numpy()).mean()),
            "int8_bytes": (out / told.file).stat().st_size,
        }


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/compression.md shows it."""
    cells = [
        (
            row["way"],
            f"{row['score']:.1f}",
            _size(row["bytes"]),
            f"{row['int8']:.1f}",
            _size(row["int8_bytes"]),
        )
        for row in rows
    ]
    return format_table(("", "accuracy", "MB", "int8", "MB"), cells)


def _size(count: int) -> str:
    return f"{count / 1e6:.2f}"


if __name__ == "__main__":
    main()
