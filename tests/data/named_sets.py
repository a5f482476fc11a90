"""Small files in the formats of the named sets, as torchvision unpacks them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from lora_lightning.data import named_folders
from tests.data.shards import picture

IDS = tuple(f"n0000000{i}" for i in range(4))


def put(file: Path, number: int, form: str = "jpeg") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture(number, form))


def fashion_mnist(root: Path, monkeypatch: pytest.MonkeyPatch, place: str = "FashionMNIST/raw") -> None:
    """40 and 20 pictures of one grey each, packed: two of each class in a row."""
    folder = root / place
    folder.mkdir(parents=True)
    for stem, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pictures = np.broadcast_to(labels[:, None, None] * 20, (count, 28, 28)).astype(np.uint8)
        for kind, data in (("images-idx3", pictures), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, data.ndim]) + np.array(data.shape, ">u4").tobytes()
            (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + data.tobytes()))


def flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "flowers-102"
    for number in range(1, 13):
        put(folder / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": np.arange(12) % 3 + 1})
    savemat(
        folder / "setid.mat",
        {"trnid": np.arange(1, 7), "valid": np.arange(7, 10), "tstid": np.arange(10, 13)},
    )
    sums = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, **sums})


def pets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in (("trainval", range(20)), ("test", range(20, 26))):
        lines = []
        for n in numbers:
            name = f"{('great_pyrenees', 'Sphynx')[n % 2]}_{n}"
            put(folder / "images" / f"{name}.jpg", n)
            lines.append(f"{name} {n % 2 + 1} {n % 2 + 1} 1")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines))


def food101(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, numbers in (("train", range(20)), ("test", range(20, 26))):
        found: dict[str, list[str]] = {"apple_pie": [], "waffles": []}
        for n in numbers:
            name = ("apple_pie", "waffles")[n % 2]
            put(folder / "images" / name / f"{n}.jpg", n)
            found[name].append(f"{name}/{n}")
        (folder / "meta" / f"{split}.json").write_text(json.dumps(found))


def eurosat(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(50):
        name = named_folders.EUROSAT_CLASSES[n % 10]
        put(root / "eurosat" / "2750" / name / f"{name}_{n}.jpg", n)
    monkeypatch.setattr(named_folders, "EUROSAT", 50)
    monkeypatch.setattr(named_folders, "EUROSAT_TEST", 10)


def stanford_cars(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kind = [("class", "i4"), ("fname", "O")]
    for split, count, file in (
        ("train", 20, "devkit/cars_train_annos.mat"),
        ("test", 6, "cars_test_annos_withlabels.mat"),
    ):
        for n in range(count):
            put(folder / f"cars_{split}" / f"{n:05d}.jpg", n)
        rows = np.array([(n % 2 + 1, f"{n:05d}.jpg") for n in range(count)], kind)
        savemat(folder / file, {"annotations": rows})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi TT", "Fiat 500"], object)})


def imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 20), ("val", 8)):
        for n in range(count):
            put(root / split / IDS[n % 4] / f"{n}.JPEG", n)
    monkeypatch.setattr(named_folders, "imagenet_ids", lambda: IDS)


WRITE: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    f.__name__: f for f in (fashion_mnist, flowers102, pets, food101, eurosat, stanford_cars, imagenet)
}


def look(image: Image.Image) -> int:
    """About the number of a picture, which JPEG has changed a little."""
    return image.getpixel((0, 0))[0]
