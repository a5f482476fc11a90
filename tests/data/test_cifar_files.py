"""CIFAR's files: what is missing is named, nothing is unpickled unchecked, downloads."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import time
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

from lora_lightning.data.named_sets import NamedSetDataModule
from lora_lightning.errors import MissingFileError


def module(root: str, **options) -> NamedSetDataModule:
    data = NamedSetDataModule(
        **{"root": root, "batch_size": 8, "num_workers": 0, "val_share": 0.2, "image_size": 32, **options}
    )
    data.prepare_data()
    data.setup()
    return data


def test_missing_files_are_named_with_every_way_to_get_them(tmp_path):
    with pytest.raises(MissingFileError) as error:
        module(str(tmp_path / "nowhere"))
    for part in (
        "CIFAR-10 is not on this machine",
        "data_batch_1, data_batch_2, data_batch_3, data_batch_4, data_batch_5, test_batch, batches.meta",
        str(tmp_path / "nowhere" / "cifar-10-batches-py"),
        "data.download=true",
        "data.root=",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        f"tar xzf cifar-10-python.tar.gz -C {tmp_path / 'nowhere'}",
    ):
        assert part in str(error.value)


def test_root_one_folder_too_deep(cifar10):
    with pytest.raises(MissingFileError, match=f"near miss: +data.root={cifar10}\n"):
        module(f"{cifar10}/cifar-10-batches-py")


def test_a_file_with_another_md5_is_never_unpickled(cifar10, tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (Path(cifar10) / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(MissingFileError, match=r"files: +data_batch_3 \(damaged: wrong md5\)"):
        module(cifar10)
    assert not (tmp_path / "ran").exists()


def test_download_offline_ends_at_once(tmp_path, offline):
    start = time.perf_counter()
    with pytest.raises(MissingFileError, match=r"cannot be downloaded now \(.*Name or service not known"):
        module(str(tmp_path), name="cifar100", download=True)
    assert time.perf_counter() - start < 5
    assert list(tmp_path.iterdir()) == []


def test_download_with_everything_there_asks_nobody(cifar10, offline):
    assert len(module(cifar10, download=True).class_names) == 10


def test_download_unpacks_an_archive_that_lies_there(cifar10, offline, tmp_path, monkeypatch):
    root = tmp_path / "other"
    root.mkdir()
    archive = root / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(Path(cifar10) / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(module(str(root), download=True).test_set) == 20
