"""Adapt, compress and quantize in either order, and what fine-tuning mends: the ResNet on the digits' target.

    python -m benchmarks.compression_chain          writes benchmarks/results/compression_chain.json, goes on
    python -m benchmarks.compression_chain --seeds  fine-tuned, compressed and fine-tuned again, three seeds
    python -m benchmarks.compression_chain --table  what is there

LoRA and full fine-tuning at the rates that `tune_digits` chose and for its epochs. One seed and the 597 test
images as they are drawn once; of three seeds they are drawn eight times each. int8 is onnxruntime's, static,
calibrated with 64 training images. Bytes are those of the parameters in float32, or of the exported file.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

import lora_lightning as ll
from benchmarks.fits import quiet, trainer
from benchmarks.methods.statistics import interval
from benchmarks.tune_digits import EPOCHS, classifier, prepare
from lora_lightning.data.digits import DigitsDataModule, load_scans, render, split_indices
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
SEEDS, DRAWINGS, DRAWN = (0, 1, 2), 8, 3  # the last: the seed of the drawings
DENSE = "fine-tuned"
OF_SEEDS: dict[str, tuple[str, ...]] = {
    DENSE: ("full",),
    "fine-tuned, compressed to .35": ("full", "0.35"),
    "fine-tuned, compressed to .35, fine-tuned": ("full", "0.35", "full"),
    "fine-tuned twice": ("full", "full"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds", action="store_true")
    asked = parser.parse_args()
    found = {"rows": [], "seeds": []}
    found |= json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not asked.table:
        quiet()
        found["torch"], part = torch.__version__, "seeds" if asked.seeds else "rows"
        for row in (of_seeds if asked.seeds else measured)(found[part]):
            found[part].append(row)
            print(json.dumps(row), flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    of_seeds_too = format_table(("", "accuracy", "against fine-tuned"), cells_of_seeds(found["seeds"]))
    print(f"{table(found['rows'])}\n\n{of_seeds_too}")


def measured(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row of each way that has none, by one seed."""
    data, batch = prepared()
    done: dict[tuple[str, ...], ImageClassifier] = {}
    for name, steps in WAYS.items():
        if name in {row["way"] for row in rows}:
            continue
        network = gone(steps, batch, done).eval()
        size = sum(4 * p.numel() for p in network.parameters())
        row = {"way": name, "score": accuracy(network, data.test_set.tensors), "bytes": size}
        yield row | int8(network, batch[:CALIBRATION], data)


def of_seeds(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each seed that has no row the accuracies of the ways."""
    _, batch = prepared()
    scans, labels = load_scans()
    test = split_indices()[2].repeat(DRAWINGS)
    drawn = render(scans[test], "target", torch.Generator().manual_seed(DRAWN)), labels[test]
    for seed in (s for s in SEEDS if s not in {row["seed"] for row in rows}):
        done: dict[tuple[str, ...], ImageClassifier] = {}
        networks = {name: gone(steps, batch, done, seed).eval() for name, steps in OF_SEEDS.items()}
        yield {"seed": seed, "scores": {name: accuracy(n, drawn) for name, n in networks.items()}}


def prepared() -> tuple[DigitsDataModule, torch.Tensor]:
    """The data, and drawings of training scans for `compress`."""
    data = DigitsDataModule("target", seed=0)
    data.setup()
    torch.manual_seed(0)
    return data, render(data.train_set.tensors[0][:256], "target")


def gone(
    steps: tuple[str, ...], batch: torch.Tensor, done: dict[tuple[str, ...], ImageClassifier], seed: int = 0
) -> nn.Module:
    """The network after the steps of a way; those that others began with are taken once."""
    module = classifier("resnet", 1e-3)
    for count, step in enumerate(steps, start=1):
        module = done.get(steps[:count]) or taken(module, step, batch, seed)
        done[steps[:count]] = module
    return module.model


def taken(module: ImageClassifier, step: str, batch: torch.Tensor, seed: int) -> ImageClassifier:
    """A copy after one step: a method, or a share of the parameters."""
    L.seed_everything(seed, verbose=False)
    rate = RATES.get(step, 1e-3)
    new = classifier("resnet", rate)
    new.model = copy.deepcopy(module.model)
    if step not in RATES:
        ll.compress(new.model.eval(), parameters=float(step), data=[batch])
        return new
    fitter = trainer(callbacks=prepare(new, step, None), max_epochs=EPOCHS, limit_val_batches=0)
    fitter.fit(new, datamodule=DigitsDataModule("target", seed=seed))
    if step == "lora":
        ll.eject(new, merged=True)
    return new


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[torch.Tensor, ...]) -> float:
    """Percent of images."""
    images, labels = data
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


def cells_of_seeds(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """As docs/compression.md shows it: means, and differences from the dense network of the same seed."""
    cells = []
    for name in OF_SEEDS if rows else ():
        scores = [row["scores"][name] for row in rows]
        away = interval([row["scores"][name] - row["scores"][DENSE] for row in rows])
        shown = "" if name == DENSE else f"{away.mean:+.1f} [{away.low:+.1f}, {away.high:+.1f}]"
        cells.append((name, f"{mean(scores):.1f}", shown))
    return cells


def _size(count: int) -> str:
    return f"{count / 1e6:.2f}"


if __name__ == "__main__":
    main()
