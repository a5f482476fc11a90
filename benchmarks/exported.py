"""What exported files cost: int8 of the embedded models of digits and of US English, and one base with
adapters as inputs against a merged file.

    python -m benchmarks.exported                      writes benchmarks/results/exported.json, by onnxruntime
    python -m benchmarks.exported --format executorch  the same of ExecuTorch's files, beside what is there
    python -m benchmarks.exported --format aoti        of those of AOTInductor
    python -m benchmarks.exported --table              what is there

One thread; times are of CPU, medians of ratios to the file in floats of the same format and round. Scores
come from the exported files: accuracy on the 597 upright test digits, word error rate of US English test
utterances, the first ones. Files of ExecuTorch take one picture, or one utterance as long as the longest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_lightning as ll
from benchmarks.measure import interleaved, machine, ratios
from lora_lightning.data.accents import VOCABULARY, AccentsDataModule
from lora_lightning.data.digits import DigitsDataModule
from lora_lightning.exporting import onnx, onnx_adapters
from lora_lightning.exporting.formats import FORMATS
from lora_lightning.exporting.subject import rows_of
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


@dataclass(frozen=True)
class Case:
    """A model that ships with the package.

    Attributes:
        inputs: one picture or utterance, by name.
        longest: the same, with zeros behind it up to the longest.
        axes: that are of any size, where a format has such.
        calibration: a few dozen, in batches.
        score: of what runs a file, in %; None of random weights.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    longest: dict[str, Tensor]
    axes: Any
    calibration: list[dict[str, Tensor]]
    score: Callable[[onnx.Run], float] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--format", choices=PARTS, default="onnx")
    given = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not given.table:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        part, measure, cases = PARTS[given.format]
        for name, make in cases.items():
            found.setdefault(part, {})[name] = measure(make())
            RESULTS.write_text(json.dumps(found | machine(1, "cpu"), indent=1) + "\n")
    print(*(table(found.get(part, {})) for part, _, _ in PARTS.values()), sep="\n\n")


def digits(name: str) -> Case:
    """A classifier of digits."""
    model = timm_model(name, num_classes=10, pretrained=False, **BUILDS[name])
    batches = list(DigitsDataModule().source_dataloader())
    images, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))

    def accuracy(run: onnx.Run) -> float:
        given = run({"x": images.numpy()})[0]
        return 100 * float((given.argmax(1) == labels.numpy()).mean())

    calibration = [{"x": images[i : i + 16]} for i in range(0, 160, 16)]
    one = {"x": images[:1]}
    return Case(model.eval(), one, one, {"x": {0: "batch"}}, calibration, accuracy)


def english() -> Case:
    """The Conformer; it has heard no Scottish or Caribbean English."""
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

    first, longest = batches[0], max(batch.waves.shape[1] for batch in batches)
    inputs = {"waves": first.waves[:1], "lengths": first.lengths[:1]}
    calibration = [
        {"waves": first.waves[i : i + 4], "lengths": first.lengths[i : i + 4]} for i in range(0, 32, 4)
    ]
    padded = inputs | {"waves": F.pad(inputs["waves"], (0, longest - first.waves.shape[1]))}
    return Case(model, inputs, padded, AXES, calibration, rate)


def vit_small() -> Case:
    """ViT-S/16 for pictures of 224 pixels, with random weights."""
    model = timm_model("vit_small_patch16_224", num_classes=10, pretrained=False)
    calibration = [{"x": torch.randn(1, 3, 224, 224)} for _ in range(4)]
    one = calibration[0]
    return Case(model.eval(), one, one, {"x": {0: "batch"}}, calibration, None)


def of_onnx(case: Case) -> dict[str, Any]:
    """Sizes, times relative to the file in floats, and scores."""
    example = {name: torch.cat([value, value]) for name, value in case.inputs.items()}
    with tempfile.TemporaryDirectory() as folder:
        words = {"dynamic": case.axes, "check": [case.inputs]}
        runs, found = of_kinds(case, folder, example, case.calibration, case.score, **words)
        model = case.model
        ll.inject(model, ll.LoRAConfig(rank=8, target_modules="all", modules_to_save=None), adapter="one")
        ll.add_adapter(model, "two")
        told = ll.export(model, example, f"{folder}/adapters", format="onnx_adapters", **words)
        sizes = {path.name: path.stat().st_size for path in told.folder.glob("*.onnx*")}
        of_each = onnx_adapters.load(told.folder)
        runs |= {"base": of_each[None], "one": of_each["one"]}
        found["base"] = {"bytes": sizes["base.onnx"]}
        found["one"] = {"bytes": sizes["one.onnx_adapter"], "difference": told.difference}
    return timed(case.inputs, runs, found)


def of_executorch(case: Case) -> dict[str, Any]:
    """The same of files of one size."""
    calibration = [row for one in case.calibration for row in single(one, case.longest)]

    def score(run: onnx.Run) -> float:
        def rows(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
            given = {name: torch.from_numpy(value) for name, value in arrays.items()}
            parts = [run({n: v.numpy() for n, v in row.items()}) for row in single(given, case.longest)]
            return [np.concatenate(each) for each in zip(*parts, strict=True)]

        assert case.score is not None
        return case.score(rows)

    with tempfile.TemporaryDirectory() as folder:
        words = {"format": "executorch", "dynamic": False}
        runs, found = of_kinds(case, folder, case.longest, calibration, score, **words)
        return timed(case.longest, runs, found)


def of_aoti(case: Case) -> dict[str, Any]:
    """The same of compiled files."""
    with tempfile.TemporaryDirectory() as folder:
        words = {"format": "aoti", "dynamic": False}
        runs, found = of_kinds(case, folder, case.inputs, case.calibration, case.score, **words)
        return timed(case.inputs, runs, found)


def single(inputs: dict[str, Tensor], like: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Rows of a batch, zeros behind them up to the size of one file's inputs."""
    return [
        {name: F.pad(value, (0, like[name].shape[-1] - value.shape[-1])) for name, value in row.items()}
        for row in rows_of(inputs)
    ]


def of_kinds(
    case: Case, folder: str, example: Any, calibration: Any, score: Any, **words: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The files in floats and in int8: what runs them, and what they are; but for what is refused."""
    runs: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for kind in ("floats", "dynamic", "static"):
        options: dict[str, Any] = {} if kind == "floats" else {"quantize": kind}
        if kind == "static":
            options["calibration"] = calibration
        try:
            told = ll.export(case.model, example, f"{folder}/{kind}", **options, **words)
        except ll.UserError as error:
            found[kind] = {"refused": str(error)}
            continue
        runs[kind] = FORMATS[told.format].load(told.folder)
        found[kind] = {"bytes": told.bytes, "difference": told.difference}
        if score is not None:
            found[kind]["score"] = score(runs[kind])
    return runs, found


def timed(inputs: dict[str, Tensor], runs: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """With the times of one input."""
    arrays = {name: value.numpy() for name, value in inputs.items()}
    steps = {name: partial(run, arrays) for name, run in runs.items()}
    times = interleaved(steps, ROUNDS, clock=time.process_time)
    for name, ratio in ratios(times, "floats").items():
        found[name]["time"] = ratio
    return found


def page_of_int8(found: dict[str, Any]) -> list[str]:
    """The rows of docs/export.md of ExecuTorch's and AOTInductor's files."""
    rows = []
    for format in ("executorch", "aoti"):
        for model, kinds in found[PARTS[format][0]].items():
            for kind, one in kinds.items():
                if "time" not in one:
                    continue
                time = one["time"]
                ratio = f"{time['ratio']:.2f} ({time['low']:.2f}–{time['high']:.2f})"
                cells = [
                    model.partition(":")[0],
                    f"`{format}`",
                    "floats" if kind == "floats" else f"int8, {kind}",
                ]
                cells += [f"{one['bytes'] / 1e6:.2f}", "1" if kind == "floats" else ratio]
                cells.append(f"{one['score']:.1f}" if "score" in one else "")
                rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return rows


CASES: dict[str, Callable[[], Case]] = {
    "ResNet, digits: accuracy": partial(digits, "resnet10t"),
    "ViT, digits: accuracy": partial(digits, "vit_tiny_patch16_224"),
    "Conformer, US English: word error rate": english,
}
PARTS: dict[str, tuple[str, Callable[[Case], dict[str, Any]], dict[str, Callable[[], Case]]]] = {
    "onnx": ("models", of_onnx, CASES),
    "executorch": ("programs", of_executorch, CASES),
    "aoti": ("compiled", of_aoti, {"ViT-S/16, random weights": vit_small}),
}


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
        if "time" in one
    ]
    return format_table(("model", "file", "MB", "of the file in floats", "score"), rows)


if __name__ == "__main__":
    main()
