"""A base that was never trained: how it is told, and its weights kept in the run's folder.

An adapter means something beside the weights that it was trained on alone, and random ones come again from no
download.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.files.weights import about_in, load_into, read_weights, write_weights
from lora_lightning.layers.norm import is_norm
from lora_lightning.layers.registry import base_modules

BASE_FILE = "base.safetensors"


def looks_untrained(model: nn.Module) -> bool:
    """Whether every norm layer is as it was built: weights and variances 1 (or 0), biases and means 0, which
    no training leaves so. False where there are no norm layers to tell by."""
    norms = [module for _, module in base_modules(model) if is_norm(module)]
    tensors = [t for m in norms for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    return bool(tensors) and all(_constant(t) for t in tensors)


def is_random(node: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a model has weights, in whole or in part, that no file gives again.

    Args:
        node: of its configuration; of this package's models `pretrained: false` without a checkpoint says
            so, whatever else was loaded (a detector's backbone).
        model: looked at where the node does not say.
    """
    if node.get("checkpoint") or node.get("pretrained"):
        return False
    ours = str(node.get("_target_")).startswith("lora_lightning.")
    return ("pretrained" in node and ours) or looks_untrained(model)


def forget_base(folder: Path) -> None:
    """Remove what an earlier run in this folder has kept."""
    (folder / BASE_FILE).unlink(missing_ok=True)


def keep_base(model: nn.Module, folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write the weights of a network that nothing else can give again.

    Args:
        about: plain values for the file's metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / BASE_FILE, model.state_dict(), about or {})


def kept_base(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The weights that are kept in the first of these folders that has any; empty where none has.

    Raises:
        AdapterFileError: the file is damaged.
    """
    file = _kept(folders)
    return read_weights(file)[0] if file else {}


def carry_base(folders: Sequence[Path], folder: Path) -> None:
    """Write the weights that are kept in one of these folders, if there are any, into another, beside an
    adapter that is added to them."""
    if file := _kept(folders):
        write_weights(folder / BASE_FILE, read_weights(file)[0], about_base(folders))


def about_base(folders: Sequence[Path]) -> dict[str, Any]:
    """What the metadata say of the weights that are kept in one of these folders.

    Raises:
        AdapterFileError: the file is damaged.
    """
    file = _kept(folders)
    return about_in(read_weights(file)[1], file) if file else {}


def put_back_base(model: nn.Module, folders: Sequence[Path]) -> None:
    """Give a network the weights that are kept in one of these folders, if there are any.

    Raises:
        AdapterFileError: the file is damaged, or another network's.
    """
    if file := _kept(folders):
        remedy = "It is another run's, or the run's configuration was changed since."
        what = "the model that the run's configuration builds"
        load_into(model, read_weights(file)[0], file, what, remedy)


def _kept(folders: Sequence[Path]) -> Path | None:
    return next((file for folder in folders if (file := folder / BASE_FILE).is_file()), None)


def _constant(tensor: Tensor) -> bool:
    return not tensor.is_meta and bool((tensor == 0).all() or (tensor == 1).all())
