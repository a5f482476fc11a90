"""NamedSetDataModule on small files of each set's own format: parts, classes, what is missing, downloads."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from torchvision.datasets import OxfordIIITPet

from lora_lightning.data import named_arrays, named_files
from lora_lightning.data.named_sets import NamedSetDataModule
from lora_lightning.errors import MissingFileError
from tests.data.named_sets import WRITE, fashion_mnist, look, pets

SIZES = {  # training, validation, test pictures
    "fashion_mnist": (30, 10, 20),
    "flowers102": (6, 3, 3),
    "pets": (15, 5, 6),
    "food101": (15, 5, 6),
    "eurosat": (30, 10, 10),
    "stanford_cars": (15, 5, 6),
    "imagenet": (15, 5, 8),
}
NAMES = {
    "fashion_mnist": ["T-shirt/top", "Trouser"],
    "flowers102": ["pink primrose", "hard-leaved pocket orchid"],
    "pets": ["Great Pyrenees", "Sphynx"],
    "food101": ["apple pie", "waffles"],
    "eurosat": ["AnnualCrop", "Forest"],
    "stanford_cars": ["Audi TT", "Fiat 500"],
    "imagenet": ["tench, Tinca tinca", "goldfish, Carassius auratus"],
}


def module(name: str, root: Path, **options) -> NamedSetDataModule:
    data = NamedSetDataModule(
        name, str(root), **{"val_share": 0.25, "batch_size": 4, "num_workers": 0, "image_size": 16, **options}
    )
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(params=list(WRITE))
def name(request, tmp_path, monkeypatch) -> str:
    WRITE[request.param](tmp_path, monkeypatch)
    return request.param


def test_parts_classes_and_batches(name, tmp_path):
    data = module(name, tmp_path)
    parts = [data.part(part) for part in ("train", "val", "test")]
    assert tuple(map(len, parts)) == SIZES[name]
    assert data.provides["class_names"][:2] == NAMES[name]
    assert data.provides["num_classes"] == len(data.class_names)
    shown = [data.show(part, i) for part in ("train", "val", "test") for i in range(len(data.part(part)))]
    assert len({n for n, _ in shown[: sum(SIZES[name][:2])]}) >= SIZES[name][0]
    assert all(picture.mode == "RGB" for _, picture in shown)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8 and labels.dtype == torch.int64


def test_pictures_keep_their_labels(name, tmp_path):
    data = module(name, tmp_path)
    classes = len(NAMES[name]) if name in ("pets", "food101", "stanford_cars") else None
    modulus = classes or {"fashion_mnist": 10, "flowers102": 3, "eurosat": 10, "imagenet": 4}[name]
    for part in ("train", "val", "test"):
        for i, label in enumerate(data.part(part).targets.tolist()):
            told, picture = data.show(part, i)
            if name == "fashion_mnist":
                number = look(picture) // 20
            else:
                number = int("".join(filter(str.isdigit, Path(told).stem))) - (name == "flowers102")
                assert abs(look(picture) - number - (name == "flowers102")) < 8
            assert number % modulus == label


@pytest.mark.parametrize(
    ("name", "gone", "words"),
    [
        ("fashion_mnist", "FashionMNIST/raw/train-labels-idx1-ubyte.gz", "train-labels-idx1-ubyte\n"),
        ("flowers102", "flowers-102/setid.mat", "setid.mat\n"),
        ("flowers102", "flowers-102/jpg/image_00012.jpg", "1 of 12 pictures: jpg/image_00012.jpg\n"),
        ("pets", "oxford-iiit-pet/images", "images\n"),
        ("pets", "oxford-iiit-pet/images/Sphynx_3.jpg", "1 of 26 pictures: images/Sphynx_3.jpg\n"),
        ("food101", "food-101/images", "images\n"),
        (
            "food101",
            "food-101/images/waffles",
            "13 of 26 pictures: images/waffles/1.jpg, images/waffles/3.jpg",
        ),
        ("eurosat", "eurosat/2750/Forest", "2750/Forest\n"),
        ("eurosat", "eurosat/2750/River/River_8.jpg", "1 of 50 pictures\n"),
        ("stanford_cars", "stanford_cars/devkit/cars_meta.mat", "devkit/cars_meta.mat\n"),
        ("stanford_cars", "stanford_cars/cars_test/00003.jpg", "1 of 26 pictures: cars_test/00003.jpg"),
        ("imagenet", "val", "files:      val\n"),
        ("imagenet", "train/n00000002", "1 of 4 folders in train: n00000002"),
    ],
)
def test_what_is_missing_is_named(name, gone, words, tmp_path, monkeypatch):
    WRITE[name](tmp_path, monkeypatch)
    place = tmp_path / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(MissingFileError) as error:
        module(name, tmp_path)
    message = str(error.value)
    assert words in message
    assert f"looked for: {tmp_path}" in message and "by hand, " in message and "{" not in message


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("fashion_mnist", "FashionMNIST/raw/t10k-images-idx3-ubyte.gz", "(damaged: "),
        ("flowers102", "flowers-102/imagelabels.mat", "imagelabels.mat (damaged)"),
        ("food101", "food-101/meta/test.json", "meta/test.json (damaged)"),
        ("stanford_cars", "stanford_cars/devkit/cars_train_annos.mat", "*.mat (damaged: "),
    ],
)
def test_what_is_damaged_is_named(name, file, words, tmp_path, monkeypatch):
    WRITE[name](tmp_path, monkeypatch)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(MissingFileError) as error:
        module(name, tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize("place", [".", "usr/share/datasets/fashion-mnist", "debian"])
def test_fashion_mnist_in_any_folder(place, tmp_path, monkeypatch):
    """The four files by themselves, below a root as a package has them, or where Debian installs them."""
    monkeypatch.setattr(named_arrays, "DEBIAN", tmp_path / "debian")
    fashion_mnist(tmp_path / "root" if place != "debian" else tmp_path, monkeypatch, place)
    assert len(module("fashion_mnist", tmp_path / "root").test_set) == 20


def test_a_near_miss(tmp_path, monkeypatch):
    pets(tmp_path / "sets", monkeypatch)
    for root in (tmp_path, tmp_path / "sets" / "oxford-iiit-pet", tmp_path / "sets" / "other"):
        with pytest.raises(MissingFileError, match=f"near miss:  data.root={tmp_path / 'sets'}\n"):
            module("pets", root)


@pytest.mark.parametrize("name", list(named_files.NAMED))
def test_offline_every_set_ends_with_one_message_and_leaves_nothing(name, tmp_path, monkeypatch, offline):
    monkeypatch.setattr(named_arrays, "DEBIAN", tmp_path / "debian")
    with pytest.raises(MissingFileError) as error:
        module(name, tmp_path / "root", download=True)
    message = str(error.value)
    by_hand = name in ("stanford_cars", "imagenet")
    assert ("cannot be downloaded." if by_hand else "Name or service not known") in message
    assert "to get it:" in message and "{" not in message
    assert not (tmp_path / "root").exists() or not any((tmp_path / "root").iterdir())
    facts = NamedSetDataModule(name, str(tmp_path / "root")).provides
    assert facts["num_classes"] == named_files.NAMED[name].classes


def test_archives_that_lie_there_are_unpacked(tmp_path, monkeypatch, offline):
    import hashlib

    pets(tmp_path / "made", monkeypatch)
    folder = tmp_path / "root" / "oxford-iiit-pet"
    folder.mkdir(parents=True)
    sums = []
    for url, _ in OxfordIIITPet._RESOURCES:
        file = folder / Path(url).name
        with tarfile.open(file, "w:gz") as tar:
            part = file.name.partition(".")[0]
            tar.add(tmp_path / "made" / "oxford-iiit-pet" / part, part)
        sums.append((url, hashlib.md5(file.read_bytes()).hexdigest()))
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", sums)
    assert len(module("pets", tmp_path / "root", download=True).test_set) == 6


def test_a_damaged_archive_is_told(tmp_path, offline):
    folder = tmp_path / "oxford-iiit-pet"
    folder.mkdir()
    for name in ("images", "annotations"):
        (folder / f"{name}.tar.gz").write_bytes(b"half")
    with pytest.raises(MissingFileError, match=r"Oxford-IIIT Pets cannot be unpacked now \("):
        module("pets", tmp_path, download=True)


def test_shots_come_from_the_training_part(tmp_path, monkeypatch):
    pets(tmp_path, monkeypatch)
    data = module("pets", tmp_path, shots=3)
    assert torch.bincount(data.train_set.targets).tolist() == [3, 3]
    assert len(data.val_set) == 5
