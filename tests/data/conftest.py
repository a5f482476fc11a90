"""Noise in the files of CIFAR-10 and CIFAR-100, and a machine without a network."""

from __future__ import annotations

import hashlib
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def dump(path: Path, content: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


def batch(count: int, classes: int, key: str, seed: int) -> dict:
    """`count` noise images; the red of the first row is the label, so that pairs can be checked."""
    labels = [(seed + i) % classes for i in range(count)]
    data = np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    data[:, 0, 0, :] = np.array(labels)[:, None]
    return {"data": data.reshape(count, -1), key: labels}


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder as CIFAR-10 unpacks: 5 training files of 20 images, a test file of 20."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    sums = {name: dump(folder / name, batch(20, 10, "labels", i)) for i, name in enumerate(BATCHES)}
    meta = dump(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in BATCHES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    return str(tmp_path / "data")


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A folder as CIFAR-100 unpacks: 200 training images, 100 test images."""
    folder = tmp_path / "data" / "cifar-100-python"
    train = dump(folder / "train", batch(200, 100, "fine_labels", 0))
    test = dump(folder / "test", batch(100, 100, "fine_labels", 1))
    meta = dump(folder / "meta", {"fine_label_names": [f"fine {i}" for i in range(100)]})
    monkeypatch.setattr(CIFAR100, "train_list", [["train", train]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", test]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": meta})
    return str(tmp_path / "data")


@pytest.fixture
def offline(monkeypatch):
    """A machine whose name lookups fail, as offline ones do."""

    def fail(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
