"""Whether the loader of detection data keeps up with the model that trains on them.

    python -m benchmarks.detection_data [--model fasterrcnn_resnet50_fpn] [--workers 2] [--device cuda]

Writes JPEG pictures of COCO's size in its format to a temporary folder, then measures, for each preset of
augmentation, how many images one CPU second gives (reading, decoding, augmenting, batching) and how many a
second `--workers` give; and how many a LoRA training step of the model takes. CPU seconds, because those of
the clock depend on what else the machine does. Writes benchmarks/results/detection_data.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import lora_lightning as ll
from benchmarks import measure
from lora_lightning.data.coco import CocoFormatDataModule
from lora_lightning.data.detection_transforms import PRESETS
from lora_lightning.models.detection import TORCHVISION, detector
from lora_lightning.utils.tables import format_table

RESULT = Path(__file__).parent / "results" / "detection_data.json"
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))
OBJECTS = 7  # a picture, COCO's mean


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = write_pictures(Path(folder), options.images)
        loaders = {preset: _loader(Path(folder), preset, options) for preset in options.presets}
        cpu = {p: _rate(make(0), options.images, time.process_time) for p, make in loaders.items()}
        clock = {
            p: _rate(make(options.workers), options.images, time.perf_counter)
            for p, make in loaders.items()
            if options.workers
        }
        step = _training_rate(options, loaders["flip" if "flip" in loaders else options.presets[0]](0))
    rows = [
        (p, f"{cpu[p]:.1f}", f"{clock[p]:.1f}" if p in clock else "–", f"{step / cpu[p]:.2f}") for p in cpu
    ]
    workers = f"images/s, {options.workers} workers"
    print(f"{options.model}, batch {options.batch}, {options.device}: {step:.2f} images/s in training")
    print(f"pictures of {kilobytes:.0f} kB; one CPU core loads:\n")
    print(format_table(("augment", "images/CPU-s", workers, "cores that the model keeps busy"), rows))
    result = {
        "model": options.model, "batch": options.batch, "size": options.size, "kilobytes": kilobytes,
        **measure.machine(1, options.device),
        "training_images_per_second": step,
        "loader_images_per_cpu_second": cpu,
        "loader_images_per_second": {"workers": options.workers, **clock},
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def write_pictures(folder: Path, count: int) -> float:
    """Smooth colours under noise, as JPEG of about 100 kB; returns the mean size in kB."""
    images, annotations = [], []
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for n in range(count):
        width, height = SIZES[n % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        picture = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        picture += rng.normal(0, 12, picture.shape)
        name = f"{n}.jpg"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "images" / name, quality=88)
        images.append({"id": n, "file_name": name, "width": width, "height": height})
        for _ in range(OBJECTS):
            sides = rng.integers(16, 200, 2)
            corner = (rng.random(2) * ([width, height] - sides)).round()
            box = [*corner.tolist(), *sides.tolist()]
            annotations.append(
                {"id": len(annotations), "image_id": n, "category_id": int(rng.integers(1, 9)), "bbox": box}
            )
    categories = [{"id": n, "name": f"class {n}"} for n in range(1, 9)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "all.json").write_text(json.dumps(content))
    return sum(f.stat().st_size for f in (folder / "images").iterdir()) / count / 1000


def _loader(folder: Path, preset: str, options: argparse.Namespace) -> Callable[[int], Any]:
    files = [str(folder / "images"), str(folder / "all.json")] * 2

    def make(workers: int) -> Any:
        data = CocoFormatDataModule(*files, augment=preset, batch_size=options.batch, num_workers=workers)
        return data.train_dataloader()

    return make


def _rate(loader: Any, images: int, clock: Callable[[], float]) -> float:
    """Images a second of the second epoch: workers run by then."""
    for _ in loader:
        pass
    start = clock()
    for _ in loader:
        pass
    return images / (clock() - start)


def _training_rate(options: argparse.Namespace, loader: Any) -> float:
    """Images a second (of the CPU, on the CPU) of a training step with LoRA as the recipes have it."""
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    model = detector(options.model, 8, min_size=options.size, max_size=1333).to(options.device).train()
    for name, norm in model.named_modules():
        if name.endswith("bn3"):  # frozen norms that normalize nothing would let random branches explode
            torch.nn.init.zeros_(norm.weight)
    ll.inject(model, ll.LoRAConfig(rank=16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batches = _batches(loader, options.device)

    def step() -> None:
        images, targets = next(batches)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    measure.wait(options.device)
    start = clock()
    for _ in range(options.steps):
        step()
    measure.wait(options.device)
    return options.steps * options.batch / (clock() - start)


def _batches(loader: Any, device: str) -> Iterator[tuple[list[torch.Tensor], list[dict[str, Any]]]]:
    """Whole batches on the device, loaded before the clock runs."""
    held = []
    for images, targets in loader:
        moved = [{k: t.to(device) for k, t in target.items()} for target in targets]
        held.append(([image.to(device).float() / 255 for image in images], moved))
    while True:
        yield from (batch for batch in held if len(batch[0]) == len(held[0][0]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="fasterrcnn_resnet50_fpn", choices=sorted(TORCHVISION))
    parser.add_argument("--size", type=int, default=800, help="shorter side of the images in the model")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--presets", type=lambda text: text.split(","), default=list(PRESETS))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
