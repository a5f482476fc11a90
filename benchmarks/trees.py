"""Trees in aerial photographs: a detector of Yellowstone's is adapted to Florida and to California.

    python -m benchmarks.trees           goes on where it was stopped

FCOS on EfficientNet-Lite0 with its real ImageNet weights is trained on a picture of Yellowstone and scored
on a second one. At each other place there is one picture of 400 × 400 pixels: each half is predicted by the
model that was adapted on the other half, and both halves make one score. There are too few trees for
validation pictures, so that the rate of a method is the one that was best at the other place, from as many
rates for each. PEFT has LoRA's rank, layers and heads. Every finished run stands in `results/trees.json`
and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import FeaturePyramidNetwork

from benchmarks.fits import FrozenStatistics, quiet, trainer
from benchmarks.real_files import FOLDER, WEIGHTS, efficientnet_lite0, require_files
from benchmarks.real_files import SHA256 as WEIGHTS_SHA256
from benchmarks.real_methods import DEPTHWISE
from benchmarks.tree_pictures import (
    CALIFORNIA,
    FLORIDA,
    HOW,
    SHA256,
    YELLOWSTONE,
    YELLOWSTONE_VAL,
    Photograph,
    read_photograph,
    write_coco,
)
from benchmarks.tune_detection import peft_model
from lora_lightning import LoRACallback, LoRAConfig, linear_probe
from lora_lightning.data.coco import CocoFormatDataModule
from lora_lightning.errors import UserError
from lora_lightning.tasks.average_precision import AveragePrecision
from lora_lightning.tasks.detection import ObjectDetector
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results"
PLACES = {"Florida": FLORIDA, "California": CALIFORNIA}
TILE = 320  # pixels of a source tile
SOURCE_EPOCHS, SOURCE_RATE = 30, 1e-3
STEPS, SEEDS = 60, (0, 1, 2)
NECK = 64
LORA = {"rank": 8, "detector_part": "all"}
RATES = {
    "linear probe": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "LoRA": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "PEFT": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}


class Backbone(nn.Module):
    """EfficientNet-Lite0's stages of strides 8, 16 and 32 in a feature pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), NECK)
        self.out_channels = NECK

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(level): x for level, x in enumerate(self.body(images))})


def detector() -> FCOS:
    """FCOS with towers of two convolutions, on pictures of up to 400 pixels as they are."""
    return FCOS(
        Backbone(),
        2,  # trees and the background
        min_size=TILE,
        max_size=400,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3),
        head=FCOSHead(NECK, 1, 2, num_convs=2),
        score_thresh=0.05,
        detections_per_img=200,
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    quiet()
    try:
        require_files(digests={WEIGHTS: WEIGHTS_SHA256[WEIGHTS]})
        require_files(digests=SHA256, how=HOW)
    except UserError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as folder:
        found = Experiment(Path(folder)).run()
    (RESULTS / "trees.md").write_text(f"{table(found)}\n")
    print(table(found))


class Experiment:
    """All trainings, of which the results file keeps what is done.

    Args:
        scratch: a folder for the tiles.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.path = RESULTS / "trees.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.source = self._source()

    def run(self) -> dict[str, Any]:
        for place in PLACES:
            self._once(place, "before", 0.0, 0)
        for method, rates in RATES.items():
            for place in PLACES:
                for rate in rates:
                    self._once(place, method, rate, 0)
            for place in PLACES:
                rate = rate_of(self.found, method, place)
                for seed in SEEDS:
                    self._once(place, method, rate, seed)
        return self.found

    def _once(self, place: str, method: str, rate: float, seed: int) -> None:
        key = _key(place, method, rate, seed)
        if key not in self.found:
            self._keep(key, self._both_halves(place, method, rate, seed))

    def _both_halves(self, place: str, method: str, rate: float, seed: int) -> dict[str, float]:
        """Scores of a place's picture, each half by the model that has seen the other one."""
        photograph = read_photograph(PLACES[place])
        height, width = photograph.pixels.shape[:2]
        halves = [photograph.cut(0, 0, width // 2, height), photograph.cut(width // 2, 0, width, height)]
        precision, trained = AveragePrecision(False, 1.0), 0
        for number, (tested, seen) in enumerate((halves, halves[::-1])):
            task = self._task(rate, method)
            if method != "before":
                trained = fit(task, self._loader([seen], seed, (height, width // 2)), method, STEPS, seed)
            precision.update(predictions(task, tested), [target_of(tested, number)])
        return {**scores_of(precision), "trained": trained}

    def _task(self, rate: float, method: str) -> ObjectDetector:
        model = detector()
        model.load_state_dict(self.source)
        if method == "PEFT":
            model = peft_model(model, LoRAConfig(**LORA, exclude_modules=DEPTHWISE))
        task = ObjectDetector(model, 1, ["tree"], optim=OptimConfig(lr=rate or SOURCE_RATE))
        if method == "linear probe":
            linear_probe(task)
        return task

    def _loader(self, parts: Sequence[Photograph], seed: int, size: tuple[int, int]) -> L.LightningDataModule:
        tiles = [tile for part in parts for tile in part.tiles(*size) if len(tile.boxes)]
        folder, notes = write_coco(tiles, Path(tempfile.mkdtemp(dir=self.scratch)))
        return CocoFormatDataModule(
            folder,
            notes,
            folder,
            notes,
            batch_size=min(4, len(tiles)),
            num_workers=0,
            seed=seed,
            strict=False,
        )

    def _source(self) -> dict[str, Tensor]:
        """The detector of Yellowstone: its last epoch's weights, kept beside the data."""
        path = FOLDER / "trees_source.pt"
        if not path.exists():
            L.seed_everything(0, verbose=False)
            model = detector()
            lacking = model.backbone.body.load_state_dict(efficientnet_lite0(1).state_dict(), strict=False)
            assert not lacking.missing_keys, lacking.missing_keys
            task = ObjectDetector(model, 1, ["tree"], optim=OptimConfig(lr=SOURCE_RATE))
            data = self._loader([read_photograph(YELLOWSTONE)], 0, (TILE, TILE))
            fit(task, data, "full", SOURCE_EPOCHS * len(data.train_dataloader()), 0)
            torch.save(model.state_dict(), path)
        self.source = torch.load(path, weights_only=True)
        if "Yellowstone" not in self.found:
            self._keep("Yellowstone", self._on_source())
        return self.source

    def _keep(self, key: str, scores: dict[str, float]) -> None:
        self.found[key] = scores
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(key, {name: round(100 * v, 1) for name, v in scores.items() if name != "trained"}, flush=True)

    def _on_source(self) -> dict[str, float]:
        task, precision = self._task(1e-3, "before"), AveragePrecision(False, 1.0)
        for number, tile in enumerate(read_photograph(YELLOWSTONE_VAL).tiles(TILE, TILE)):
            precision.update(predictions(task, tile), [target_of(tile, number)])
        return scores_of(precision)


def fit(task: ObjectDetector, data: L.LightningDataModule, method: str, steps: int, seed: int) -> int:
    """Train for so many steps, or until it collapses; returns how many parameters did."""
    L.seed_everything(seed, verbose=False)
    callbacks: list[L.Callback] = [FrozenStatistics()]
    if method == "LoRA":
        callbacks.append(LoRACallback(LoRAConfig(**LORA), verbose=False))
    fitter = trainer(
        max_steps=steps, max_epochs=-1, limit_val_batches=0, gradient_clip_val=5.0, callbacks=callbacks
    )
    try:
        fitter.fit(task, datamodule=data)
    except UserError as error:  # scored as it stands
        print(error, flush=True)
    return sum(p.numel() for p in task.parameters() if p.requires_grad)


def target_of(part: Photograph, number: int) -> dict[str, Tensor]:
    """The truth of a picture, as torchvision's detectors have it."""
    return {
        "boxes": torch.from_numpy(part.boxes),
        "labels": torch.ones(len(part.boxes), dtype=torch.long),
        "image_id": torch.tensor(number),
    }


def scores_of(precision: AveragePrecision) -> dict[str, float]:
    return {name: float(precision.compute()[name]) for name in ("map", "map_50")}


@torch.no_grad()
def predictions(task: ObjectDetector, part: Photograph) -> list[dict[str, Tensor]]:
    return task.eval()([torch.from_numpy(part.pixels.copy()).permute(2, 0, 1).float() / 255])


def rate_of(found: dict[str, Any], method: str, place: str) -> float:
    """The best at the other place."""
    other = next(p for p in PLACES if p != place)
    return max(RATES[method], key=lambda rate: found[_key(other, method, rate, 0)]["map_50"])


def table(found: dict[str, Any]) -> str:
    """AP50 in %, mean and standard deviation over the seeds."""
    rows = [("before", *(f"{100 * found[_key(p, 'before', 0.0, 0)]['map_50']:.1f}" for p in PLACES), "0")]
    for method in RATES:
        cells, trained = [], 0
        for place in PLACES:
            rate = rate_of(found, method, place)
            runs = [found[_key(place, method, rate, seed)] for seed in SEEDS]
            values = [100 * run["map_50"] for run in runs]
            cells.append(f"{mean(values):.1f} ± {stdev(values):.1f} at {rate:g}")
            trained = runs[0]["trained"]
        rows.append((method, *cells, f"{trained:,}"))
    return format_table(("AP50 %", *PLACES, "trained"), rows)


def _key(place: str, method: str, rate: float, seed: int) -> str:
    return f"{place}, {method}, {rate:g}, seed {seed}"


if __name__ == "__main__":
    main()
