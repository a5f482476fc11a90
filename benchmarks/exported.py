"""What exported files cost: int8 of the embedded models of digits and of US English, and one base with
adapters as inputs against a merged file.

    python -m benchmarks.exported          writes benchmarks/results/exported.json
    python -m benchmarks.exported --table  what is there

onnxruntime on one thread; times are of CPU, medians of ratios to the file in floats of the same round. Scores
come from the exported files: accuracy on the 597 upright test digits, word error rate of US English test
utterances, the first ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lightning as ll
from benchmarks.measure import interleaved, machine, ratios
from lora_lightning.data.accents import VOCABULARY, AccentsDataModule
from lora_lightning.data.digits import DigitsDataModule
from lora_lightning.exporting import onnx, onnx_adapters
from lora_lightning.models.ctc import conformer_ctc
from lora_lightning.models.timm import timm_model
from lora_lightning.tasks.error_rates import Transcript, error_rate
from lora_lightning.tasks.vocabulary import greedy
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results" / "exported.json"
ROUNDS, BATCHES = 30, 2
AXES = {"waves": {0: "batch", 1: "samples"}, "lengths": {0: "batch"}}
BUILDS: dict[str, dict[str, Any]] = {
    "resnet10t": {"checkpoint": "resnet_digits", "channels": [16, 32, 64, 128], "output_stride": 8},
    "vit_tiny_patch16_224": {
        "checkpoint": "vit_digits", "img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4,
        "num_heads": 3,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        found = {
            "ResNet, digits: accuracy": digits("resnet10t", ("static",)),
            "ViT, digits: accuracy": digits("vit_tiny_patch16_224", ("dynamic", "static")),
            "Conformer, US English: word error rate": english(),
        }
        RESULTS.write_text(json.dumps({"models": found, **machine(1, "cpu")}, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())["models"]))


def digits(name: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """A model of digits that ships with the package."""
    model = timm_model(name, num_classes=10, pretrained=False, **BUILDS[name])
    batches = list(DigitsDataModule().source_dataloader())
    images, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))

    def accuracy(run: onnx.Run) -> float:
        given = run({"x": images.numpy()})[0]
        return 100 * float((given.argmax(1) == labels.numpy()).mean())

    inputs = {"x": images[:1]}
    calibration = [{"x": images[i : i + 16]} for i in range(0, 160, 16)]
    return costs(model.eval(), inputs, {"x": {0: "batch"}}, calibration, accuracy, kinds)


def english() -> dict[str, Any]:
    """The Conformer that ships with the package; it has heard no Scottish or Caribbean English."""
    model = conformer_ctc(VOCABULARY, checkpoint="conformer_us").eval()
    data = AccentsDataModule(accent="scottish", kept=["us"])
    data.setup("test")
    loaders = data.test_dataloader()
    every = [b for loader in (loaders if isinstance(loaders, list) else [loaders]) for b in loader]
    batches = [batch for batch in every if {*batch.accents} == {"us"}][:BATCHES]

    def rate(run: onnx.Run) -> float:
        pairs: list[Any] = []
        for batch in batches:
            logits, frames = run({"waves": batch.waves.numpy(), "lengths": batch.lengths.numpy()})
            heard = greedy(torch.from_numpy(logits), torch.from_numpy(frames), VOCABULARY)
            rows = zip(batch.ids, batch.accents, batch.speakers, batch.texts, heard, strict=True)
            pairs += [Transcript(*row) for row in rows]
        return 100 * error_rate(pairs).rate

    first = batches[0]
    inputs = {"waves": first.waves[:1], "lengths": first.lengths[:1]}
    calibration = [
        {"waves": first.waves[i : i + 4], "lengths": first.lengths[i : i + 4]} for i in range(0, 32, 4)
    ]
    return costs(model, inputs, AXES, calibration, rate, ("dynamic", "static"))


def costs(
    model: nn.Module, inputs: Any, axes: Any, calibration: list[Any], score: Any, kinds: tuple[str, ...]
) -> dict[str, Any]:
    """Sizes, times relative to the file in floats, and scores."""
    arrays = {name: value.numpy() for name, value in inputs.items()}
    example = {name: torch.cat([value, value]) for name, value in inputs.items()}
    runs: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("floats", *kinds):
            options: dict[str, Any] = {} if kind == "floats" else {"quantize": kind}
            if kind == "static":
                options["calibration"] = calibration
            told = ll.export(model, example, f"{folder}/{kind}", dynamic=axes, check=[inputs], **options)
            runs[kind] = onnx.load(told.folder)
            found[kind] = {"bytes": told.bytes, "score": score(runs[kind]), "difference": told.difference}
        ll.inject(model, ll.LoRAConfig(rank=8, target_modules="all", modules_to_save=None), adapter="one")
        ll.add_adapter(model, "two")
        told = ll.export(
            model, example, f"{folder}/adapters", dynamic=axes, check=[inputs], format="onnx_adapters"
        )
        sizes = {path.name: path.stat().st_size for path in told.folder.glob("*.onnx*")}
        of_each = onnx_adapters.load(told.folder)
        runs |= {"base": of_each[None], "one": of_each["one"]}
        found["base"] = {"bytes": sizes["base.onnx"]}
        found["one"] = {"bytes": sizes["one.onnx_adapter"], "difference": told.difference}
    steps = {name: partial(run, arrays) for name, run in runs.items()}
    times = interleaved(steps, ROUNDS, clock=time.process_time)
    for name, ratio in ratios(times, "floats").items():
        found[name]["time"] = ratio
    return found


def table(models: dict[str, Any]) -> str:
    """As docs/export.md shows it."""
    rows = [
        (
            model,
            what,
            f"{one['bytes'] / 1e6:.2f}",
            f"{one['time']['ratio']:.2f} ({one['time']['low']:.2f}–{one['time']['high']:.2f})",
            f"{one['score']:.1f}" if "score" in one else "",
        )
        for model, found in models.items()
        for what, one in found.items()
    ]
    return format_table(("model", "file", "MB", "of the file in floats", "score"), rows)


if __name__ == "__main__":
    main()
