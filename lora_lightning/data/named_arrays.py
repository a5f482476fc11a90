"""Named sets of small pictures that fit into memory: CIFAR-10, CIFAR-100, Fashion-MNIST."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_lightning.data.decoding import Enough
from lora_lightning.data.picture_sets import PictureSet
from lora_lightning.utils.libraries import loading

with loading("torchvision"):
    from torchvision.datasets import CIFAR10, FashionMNIST
    from torchvision.datasets.utils import check_integrity

Part = Literal["train", "val", "test"]
Read = tuple[PictureSet, list[str]]  # pictures and the names of the classes
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it
IDX = {"images": b"\0\0\x08\x03", "labels": b"\0\0\x08\x01"}  # first bytes: of three dimensions, of one
SIDE = 28


class PictureArrays(PictureSet):
    """Pictures (n, height, width[, 3]), uint8, held in memory, and their classes (n,)."""

    def __init__(self, data: np.ndarray, targets: Tensor) -> None:
        self.data, self.targets = data, targets

    def picture(self, index: int, enough: Enough | None = None) -> Image.Image:
        return Image.fromarray(self.data[index]).convert("RGB")


def cifar_missing(dataset: type[CIFAR10], root: Path) -> list[str]:
    """The files that are missing or damaged. They are pickles: none without the official md5 is read."""
    folder = root / dataset.base_folder
    meta = [dataset.meta["filename"], dataset.meta["md5"]]
    return [
        f"{name} (damaged: wrong md5)" if (folder / name).is_file() else name
        for name, md5 in [*dataset.train_list, *dataset.test_list, meta]
        if not check_integrity(str(folder / name), md5)
    ]


def cifar_read(dataset: type[CIFAR10], root: Path, part: Part) -> Read:
    whole = dataset(str(root), train=part == "train")
    return PictureArrays(whole.data, torch.tensor(whole.targets)), list(whole.classes)


def fashion_missing(root: Path) -> list[str]:
    """The files of Fashion-MNIST that are nowhere below `root`, or damaged."""
    return [told for name in _fashion_names() if (told := _fashion_problem(root, name))]


def fashion_read(root: Path, part: Part) -> Read:
    stem = "train" if part == "train" else "t10k"
    images, labels = (_idx(_fashion_file(root, f"{stem}-{kind}-idx{d}-ubyte"), kind) for kind, d in
                      (("images", 3), ("labels", 1)))  # fmt: skip
    targets = torch.from_numpy(labels.astype(np.int64))
    return PictureArrays(images, targets), list(FashionMNIST.classes)


def _fashion_names() -> list[str]:
    return [file.removesuffix(".gz") for file, _ in FashionMNIST.resources]


def _fashion_file(root: Path, name: str) -> Path | None:
    """Packed or not, where torchvision puts it, in the folder itself, or where Debian's package does."""
    places = (
        root / "FashionMNIST" / "raw",
        root,
        root / "raw",
        root / "usr/share/datasets/fashion-mnist",
        DEBIAN,
    )
    return next((f for p in places for f in (p / name, p / f"{name}.gz") if f.is_file()), None)


def _fashion_problem(root: Path, name: str) -> str | None:
    file = _fashion_file(root, name)
    if file is None:
        return name
    try:
        _idx(file, "images" if "images" in name else "labels")
    except ValueError as error:
        return f"{file.name} (damaged: {error})"
    return None


def _idx(file: Path | None, kind: str) -> np.ndarray:
    """(n, 28, 28) pictures or (n,) labels, uint8, of LeCun's IDX format.

    Raises:
        ValueError: it is not of this format, or not whole.
    """
    if file is None:
        raise ValueError("not there")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(" ".join(str(error).split())) from None
    shape = tuple(np.frombuffer(data[4 : 4 + 4 * data[3]], ">u4").tolist()) if data[:4] == IDX[kind] else ()
    if not shape or (kind == "images" and shape[1:] != (SIDE, SIDE)):
        raise ValueError(f"not {kind} in the IDX format")
    start = 4 + 4 * len(shape)
    if len(data) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{len(data) - start:,} bytes where {np.prod(shape, dtype=np.int64):,} belong")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
