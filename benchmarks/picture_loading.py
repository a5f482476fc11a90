"""How many pictures a second one core loads for training, by several ways of decoding and cropping, and how
many a model trains on in the same time.

    python -m benchmarks.picture_loading [--rounds 15]

Two photographs that ship with scikit-learn, with a sensor's noise, as JPEG of ImageNet's usual size and of
a phone's (12 million pixels). Each way makes what a worker hands over: a random crop, mirrored, 3 x 224 x
224 of uint8. All ways run in turn, round after round, on one thread, timed in CPU time; reported are medians
and quartiles of the ratio to PIL's decoding and crop in the same round. Ways whose packages are not installed
are left out: pip install simplejpeg opencv-python-headless. Writes benchmarks/results/picture_loading.json
and .md.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

import lora_lightning as ll
from benchmarks.measure import interleaved, machine, ratios
from benchmarks.models import BLOCKS
from lora_lightning.data.augment import AugmentConfig
from lora_lightning.data.cropping import enough_for
from lora_lightning.data.decoding import read_picture
from lora_lightning.data.image_folder import ImageFolderDataModule
from lora_lightning.data.picture_transform import preprocessing_of, unfinished_training_transform
from lora_lightning.data.pictures import PictureDataModule
from lora_lightning.data.stream import StreamDataModule

SIZE = 224
FILES = 128
SIZES = {"ImageNet's, 500 x 333": (500, 333), "a phone's, 4000 x 3000": (4000, 3000)}
AUGMENTS = {"light: crops from 0.08": {}, "small_pictures: crops from 0.7": {"crop_scale": (0.7, 1.0)}}
MODELS = ("vit_small_patch16_224", "resnet50")
ON_PAPER = {"vit_base_patch16_224": "on_paper_vit_base_128_bf16-mixed.json"}
BASE = "PIL whole, crop by PIL"
OURS = "this library: PIL scaled for each crop, as a tensor"
INTRODUCTION = (
    "`python -m benchmarks.picture_loading`: two photographs as JPEG, each made a random crop of 224 pixels, "
    "mirrored, uint8, on one thread, in CPU time; the ratio is the median (and quartiles) over interleaved "
    "rounds. The models train with LoRA of rank 8: on one core of this machine, and on an H100 on paper "
    "(`benchmarks.on_paper`, bf16-mixed, 128 pictures), which no machine was there to measure."
)
RESULTS = Path(__file__).parent / "results"
Way = Callable[[bytes], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(1, "cpu"), "rounds": rounds, "ways": {}}
    for size, pixels in SIZES.items():
        files = photographs(*pixels)
        for augment, options in AUGMENTS.items():
            steps = {n: _over(way, files) for n, way in ways(AugmentConfig(**options)).items()}
            rows = ratios(interleaved(steps, rounds, warm_up=1, clock=time.process_time), BASE)
            for name, row in rows.items():
                row["pictures_a_second"] = 1e3 * len(files) / row["ms"]
                print(
                    f"{size}, {augment}: {name}: {row['pictures_a_second']:.1f} a second, {row['ratio']:.2f}"
                )
            found["ways"][f"{size} pixels, {augment}"] = rows
    found["sources"] = sources(rounds)
    found["models"] = {f"{name}, one core": model_rate(name, max(3, rounds // 3)) for name in MODELS}
    for name, file in ON_PAPER.items():
        milliseconds = json.loads((RESULTS / file).read_text())["ways"]["fused"]["ms"]
        found["models"][f"{name}, an H100 on paper"] = 128e3 / milliseconds
    (RESULTS / "picture_loading.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "picture_loading.md").write_text(page(found))


def photographs(width: int, height: int) -> list[bytes]:
    """The two photographs as JPEG files of this size."""
    files = []
    for number, pixels in enumerate(load_sample_images().images):
        scaled = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        noise = np.random.default_rng(number).normal(0, 4, (height, width, 3))
        file = io.BytesIO()
        noisy = (np.asarray(scaled) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def ways(augment: AugmentConfig) -> dict[str, Way]:
    """Name -> JPEG file to (3, 224, 224) of uint8."""
    facts = preprocessing_of(None, SIZE)
    scale = tuple(augment.crop_scale or (1, 1))
    ours = unfinished_training_transform(facts, augment)
    enough, least = enough_for(ours), math.ceil(SIZE / math.sqrt(scale[0]))
    crop = RandomResizedCropAndInterpolation(SIZE, scale, interpolation="bicubic")
    pils = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    tensors = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
        ]
    )
    found: dict[str, Way] = {
        BASE: lambda file: pils(read_picture(file)),
        OURS: lambda file: ours(read_picture(file, enough)),
        "PIL whole, crop as a tensor": lambda file: ours(read_picture(file)),
        "PIL scaled for the smallest crop, crop by PIL": lambda file: pils(
            read_picture(file, lambda *size: least)
        ),
        "PIL scaled for each crop, crop by PIL": lambda file: _scaled_crop(file, crop),
        "torchvision's decode_jpeg and v2": lambda file: tensors(
            decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.RGB)
        ),
        "decoding alone, PIL whole": lambda file: torch.empty(read_picture(file).size),
    }
    if find_spec("simplejpeg"):
        import simplejpeg

        found["simplejpeg whole, crop as a tensor"] = lambda file: ours(
            Image.fromarray(simplejpeg.decode_jpeg(file))
        )
        found["simplejpeg scaled, crop as a tensor"] = lambda file: ours(
            Image.fromarray(simplejpeg.decode_jpeg(file, min_height=least, min_width=least, min_factor=1))
        )
    if find_spec("cv2"):
        found["OpenCV whole, crop by OpenCV"] = lambda file: _opencv(file, crop)
    return found


def _scaled_crop(file: bytes, crop: RandomResizedCropAndInterpolation) -> Tensor:
    """The crop is drawn first, then the file is decoded at the least scale that has as many pixels in it."""
    with Image.open(io.BytesIO(file)) as image:
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        full = image.width
        image.draft("RGB", (full * SIZE // min(height, width), image.height * SIZE // min(height, width)))
        by = image.width / full
        box = (left * by, top * by, (left + width) * by, (top + height) * by)
        return v2.functional.pil_to_tensor(
            image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
        )


def _opencv(file: bytes, crop: RandomResizedCropAndInterpolation) -> Tensor:
    import cv2

    cv2.setNumThreads(1)
    image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)
    blank = Image.new("1", (image.shape[1], image.shape[0]))
    top, left, height, width = crop.get_params(blank, crop.scale, crop.ratio)
    small = cv2.resize(
        image[top : top + height, left : left + width], (SIZE, SIZE), interpolation=cv2.INTER_AREA
    )
    return torch.from_numpy(small).permute(2, 0, 1).contiguous()


def _over(way: Way, files: list[bytes]) -> Callable[[], None]:
    def step() -> None:
        for file in files:
            way(file)

    return step


def sources(rounds: int) -> dict[str, dict[str, float]]:
    """An epoch of FILES pictures by the data module's own loader, without workers, from a folder of files and
    from shards."""
    twice = photographs(*next(iter(SIZES.values())))
    files = [twice[n % 2] + str(n).encode() for n in range(FILES + 2)]  # none is another's copy
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaders = {kind: data.train_dataloader() for kind, data in _sources(folder, files).items()}
        steps = {kind: partial(_epoch, loader) for kind, loader in loaders.items()}
        rows = ratios(interleaved(steps, rounds, warm_up=1, clock=time.process_time), "a folder")
    for kind, row in rows.items():
        row["pictures_a_second"] = 1e3 * FILES / row["ms"]
        print(f"from {kind}: {row['pictures_a_second']:.1f} a second, {row['ratio']:.2f}")
    return rows


def _sources(folder: Path, files: list[bytes]) -> dict[str, PictureDataModule]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from litdata.streaming.writer import BinaryWriter

    (folder / "tar").mkdir()
    writer = BinaryWriter(str(folder / "lit"), chunk_size=32)
    for number, file in enumerate(files):
        part = "train" if number < FILES else "val"
        place = folder / "files" / part / str(number % 2) / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file)
        if part == "val":
            continue
        writer[number] = {"image": file, "label": number % 2}
        with tarfile.open(folder / "tar" / f"{number // 32}.tar", "a") as tar:
            tar.add(place, f"{number}.jpg")
            label = tarfile.TarInfo(f"{number}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(str(number % 2).encode()))
    writer.done()
    writer.merge()
    table = pa.table({"image": files[:FILES], "label": [n % 2 for n in range(FILES)]})
    pq.write_table(table, folder / "all.parquet", row_group_size=32)
    options = {"num_workers": 0, "batch_size": 8, "image_size": SIZE}
    found: dict[str, PictureDataModule] = {
        "a folder": ImageFolderDataModule(str(folder / "files"), test_share=0, **options)
    }
    for kind, source in (("tar", "tar"), ("parquet", "all.parquet"), ("litdata", "lit")):
        place = str(folder / source)
        more = {"val_source": place, "class_names": 2, "index": str(folder / "index"), **options}
        found[kind] = StreamDataModule(place, **more)
    return found


def _epoch(loader: DataLoader) -> None:
    for _ in loader:
        pass


def model_rate(name: str, rounds: int) -> float:
    """Pictures a second that one core trains on, with LoRA of rank 8."""
    targets = rf".*{BLOCKS}" if "vit" in name else "all"
    model = timm.create_model(name, num_classes=10)
    ll.inject(model, ll.LoRAConfig(rank=8, target_modules=targets, modules_to_save="auto"))
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.arange(4)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    times = interleaved({"step": step}, rounds, warm_up=1, clock=time.process_time)["step"]
    return len(images) / sorted(times)[len(times) // 2]


def page(found: dict[str, Any]) -> str:
    """The results for people."""
    lines = ["# Pictures a second of one core", "", INTRODUCTION, ""]
    for title, rows in found["ways"].items():
        lines += [f"## {title}", "", "| way | pictures a second | time / PIL |", "| --- | ---: | ---: |"]
        lines += [
            f"| {name} | {row['pictures_a_second']:.0f} | {row['ratio']:.2f} "
            f"({row['low']:.2f}–{row['high']:.2f}) |"
            for name, row in sorted(rows.items(), key=lambda item: item[1]["ratio"])
        ]
        lines.append("")
    lines += ["## From a folder and from shards, 500 x 333 pixels", ""]
    lines += ["| from | pictures a second | time / a folder |", "| --- | ---: | ---: |"]
    lines += [
        f"| {kind} | {row['pictures_a_second']:.0f} | {row['ratio']:.2f} "
        f"({row['low']:.2f}–{row['high']:.2f}) |"
        for kind, row in found["sources"].items()
    ]
    lines += [
        "",
        "## Cores that a model needs",
        "",
        "| model | pictures a second | " + " | ".join(found["ways"]) + " |",
    ]
    lines.append("| --- | ---: |" + " ---: |" * len(found["ways"]))
    for name, rate in found["models"].items():
        cores = [rate / rows[OURS]["pictures_a_second"] for rows in found["ways"].values()]
        lines.append(
            f"| {name} | {rate:,.1f} | "
            + " | ".join(f"{c:.0f}" if c >= 10 else f"{c:.2g}" for c in cores)
            + " |"
        )
    told = found["machine"]
    return (
        "\n".join([*lines, "", f"{told['device']}, torch {told['torch']}, {found['rounds']} rounds."]) + "\n"
    )


if __name__ == "__main__":
    main()
