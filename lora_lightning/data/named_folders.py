"""Named sets of picture files: Oxford Flowers and Pets, Food-101, EuroSAT, Stanford Cars, ImageNet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_lightning.data.decoding import SUFFIXES, Enough, read_picture
from lora_lightning.data.named_arrays import Part, Read
from lora_lightning.data.picture_sets import PicturePart, PictureSet, stratified_split
from lora_lightning.utils.libraries import loading

with loading("timm"):
    from timm.data import ImageNetInfo

with loading("torchvision"):
    from torchvision.datasets import EuroSAT, Flowers102, Food101, OxfordIIITPet, StanfordCars
    from torchvision.datasets.utils import check_integrity

SHOWN = 5  # missing pictures that are named
EUROSAT = 27_000  # pictures
EUROSAT_TEST = (
    5_400  # a fifth, as in its paper (Helber et al. 2019, arXiv 1709.00029); it has no split of its own
)
EUROSAT_CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
    "Residential", "River", "SeaLake",
)  # fmt: skip
SPLIT_SEED = 0


class PictureFiles(PictureSet):
    """Pictures in files, and their classes (n,).

    Args:
        folder: to which the names are relative.
        files: by which they are named.
    """

    def __init__(self, folder: Path, files: Sequence[str], targets: Tensor) -> None:
        self.folder, self.files, self.targets = folder, list(files), targets

    def picture(self, index: int, enough: Enough | None = None) -> Image.Image:
        return read_picture(self.folder / self.files[index], enough)

    def name(self, index: int) -> str:
        return self.files[index]


def _pictures(folder: Path, pairs: Iterable[tuple[str | Path, int]], classes: Sequence[str]) -> Read:
    """Of (path below the folder or absolute, class)."""
    files, targets = zip(*pairs, strict=True)
    names = [os.path.relpath(f, folder) if os.path.isabs(f) else str(f) for f in files]
    return PictureFiles(folder, names, torch.tensor(targets, dtype=torch.int64)), list(classes)


def flowers_missing(root: Path) -> list[str]:
    folder = root / "flowers-102"
    lists = [Flowers102._file_dict[key] for key in ("label", "setid")]
    if bad := [_said(folder / name) for name, md5 in lists if not check_integrity(str(folder / name), md5)]:
        return [*bad, *([] if (folder / "jpg").is_dir() else ["jpg"])]
    sets = (
        (Flowers102(str(root), split) for split in ("train", "val", "test"))
        if (folder / "jpg").is_dir()
        else ()
    )
    files = [f for one in sets for f in one._image_files]
    return _absent(folder, files) if files else ["jpg"]


def flowers_read(root: Path, part: Part) -> Read:
    one = Flowers102(str(root), part)
    return _pictures(
        root / "flowers-102", zip(one._image_files, one._labels, strict=True), Flowers102.classes
    )


def pets_missing(root: Path) -> list[str]:
    folder = root / "oxford-iiit-pet"
    lists = [f"annotations/{name}.txt" for name in ("trainval", "test")]
    if bad := [n for n in (*lists, "images") if not (folder / n).exists()]:
        return bad
    return _absent(folder, [f for s in ("trainval", "test") for f in OxfordIIITPet(str(root), s)._images])


def pets_read(root: Path, part: Part) -> Read:
    one = OxfordIIITPet(str(root), "test" if part == "test" else "trainval")
    return _pictures(root / "oxford-iiit-pet", zip(one._images, one._labels, strict=True), one.classes)


def food_missing(root: Path) -> list[str]:
    folder = root / "food-101"
    lists = [f"meta/{name}.json" for name in ("train", "test")]
    if bad := [n for n in lists if not _is_json(folder / n)]:
        return [_said(folder / n, n) for n in bad]
    if not (folder / "images").is_dir():
        return ["images"]
    return _absent(folder, [f for s in ("train", "test") for f in Food101(str(root), s)._image_files])


def food_read(root: Path, part: Part) -> Read:
    one = Food101(str(root), "test" if part == "test" else "train")
    classes = [name.replace("_", " ") for name in one.classes]
    return _pictures(root / "food-101", zip(one._image_files, one._labels, strict=True), classes)


def eurosat_missing(root: Path) -> list[str]:
    folder = root / "eurosat" / "2750"
    if gone := [f"2750/{name}" for name in EUROSAT_CLASSES if not (folder / name).is_dir()]:
        return gone
    count = len(EuroSAT(str(root)).samples)
    return [] if count == EUROSAT else [f"{EUROSAT - count:,} of {EUROSAT:,} pictures"]


def eurosat_read(root: Path, part: Part) -> Read:
    one = EuroSAT(str(root))
    pictures, classes = _pictures(root / "eurosat", one.samples, one.classes)
    train, test = stratified_split(pictures.targets, EUROSAT_TEST, SPLIT_SEED)
    return PicturePart(pictures, test if part == "test" else train), classes


def cars_missing(root: Path) -> list[str]:
    folder = root / "stanford_cars"
    lists = ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")
    if bad := [n for n in (*lists, "cars_train", "cars_test") if not (folder / n).exists()]:
        return bad
    try:
        sets = [StanfordCars(str(root), split) for split in ("train", "test")]
    except (ValueError, TypeError, KeyError, NotImplementedError, OSError) as error:
        return [f"*.mat (damaged: {' '.join(str(error).split())[:100]})"]
    return _absent(folder, [f for one in sets for f, _ in one._samples])


def cars_read(root: Path, part: Part) -> Read:
    one = StanfordCars(str(root), "test" if part == "test" else "train")
    pairs = ((f, int(label)) for f, label in one._samples)
    return _pictures(root / "stanford_cars", pairs, [str(name) for name in one.classes])


def imagenet_missing(root: Path) -> list[str]:
    """The folders of ILSVRC 2012 as torchvision unpacks them: train and val, each with 1,000 of pictures."""
    wanted = imagenet_ids()
    told = []
    for part in ("train", "val"):
        there = {f.name for f in os.scandir(root / part) if f.is_dir()} if (root / part).is_dir() else set()
        gone = [name for name in wanted if name not in there]
        if len(gone) == len(wanted):
            told.append(part)
        elif gone:
            told.append(f"{len(gone):,} of {len(wanted):,} folders in {part}: {', '.join(gone[:SHOWN])}")
    return told


def imagenet_read(root: Path, part: Part) -> Read:
    """The validation pictures are the ones to test on, as everywhere: the test pictures have no labels."""
    folder = root / ("val" if part == "test" else "train")
    pairs = [
        (f"{name}/{file}", label)
        for label, name in enumerate(imagenet_ids())
        for file in sorted(os.listdir(folder / name))
        if os.path.splitext(file)[1].lower() in SUFFIXES
    ]
    return _pictures(folder, pairs, _imagenet_names())


@lru_cache
def imagenet_ids() -> tuple[str, ...]:
    """The WordNet ids of the 1,000 classes, of class 0 first."""
    return tuple(ImageNetInfo().label_names())


def _imagenet_names() -> list[str]:
    """The words of each class; the id too where two have the same (crane, maillot)."""
    names = [ImageNetInfo().index_to_description(i) for i in range(len(imagenet_ids()))]
    return [n if names.count(n) == 1 else f"{n} ({w})" for n, w in zip(names, imagenet_ids(), strict=True)]


def _absent(folder: Path, files: Iterable[str | Path]) -> list[str]:
    """Those of the files that are not there, counted; a folder is listed once."""
    wanted = [Path(f) for f in files]
    listed: dict[Path, set[str]] = {
        above: set(os.listdir(above)) if above.is_dir() else set() for above in {f.parent for f in wanted}
    }
    gone = [str(f.relative_to(folder)) for f in wanted if f.name not in listed[f.parent]]
    if not gone:
        return []
    more = ", …" if len(gone) > SHOWN else ""
    return [f"{len(gone):,} of {len(wanted):,} pictures: {', '.join(gone[:SHOWN])}{more}"]


def _said(file: Path, name: str | None = None) -> str:
    return f"{name or file.name} (damaged)" if file.is_file() else name or file.name


def _is_json(file: Path) -> bool:
    try:
        content: Any = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and all(isinstance(v, list) for v in content.values())
