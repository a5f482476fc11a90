"""Finding and reading the safetensors files that models start from; pickles are refused unread."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, MissingFileError, did_you_mean
from lora_lightning.files.hubs.fetch import fetched
from lora_lightning.files.weights import read_weights
from lora_lightning.utils.marks import path

Weights = Annotated[str | Path | None, path("a .safetensors file, or the name of shipped weights")]
SHIPPED = Path(__file__).parent / "weights"
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")


def base_file(checkpoint: str | Path) -> Path:
    """The file meant by a path, an address on a hub, or the bare name of weights shipped in the package.

    Raises:
        MissingFileError: there is no such file or name.
        AdapterFileError: not a .safetensors file.
    """
    given = fetched(checkpoint, adapter=False).expanduser()
    if not given.suffix and given.name == str(checkpoint):
        shipped = sorted(p.stem for p in SHIPPED.glob("*.safetensors"))
        if given.name in shipped:
            return SHIPPED / f"{given.name}.safetensors"
        raise MissingFileError(
            f"checkpoint={str(checkpoint)!r}: no such weights in the package"
            f" ({', '.join(shipped) or 'none are shipped'}).{did_you_mean(given.name, shipped)}"
            " Give one of these names, or the path of a file that ends in .safetensors."
        )
    path = given.resolve()
    if path.suffix.lower() in PICKLED:
        raise AdapterFileError(_pickled(str(checkpoint), path))
    if path.suffix != ".safetensors":
        raise AdapterFileError(
            f"checkpoint={str(checkpoint)!r}: give a file that ends in .safetensors"
            " (safetensors.torch.save_file writes it)."
        )
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.safetensors") if p.is_file()]
        raise MissingFileError(
            f"checkpoint={str(checkpoint)!r}: there is no file {path}.{did_you_mean(path.name, siblings)} "
            "Give one that there is."
        )
    return path


def _pickled(checkpoint: str, path: Path) -> str:
    target = path.with_suffix(".safetensors")
    convert = (
        "import torch, safetensors.torch; "
        f"d = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        "d = d.get('state_dict', d.get('model', d)); "
        "safetensors.torch.save_file({k: v.clone() for k, v in d.items()}, "
        f"{str(target)!r})"
    )
    return (
        f"checkpoint={checkpoint!r}: {path.suffix} files are pickles, which can run any code when "
        "they are read; only .safetensors files are loaded, and nothing was read from this one. "
        f'Convert it:\n  python -c "{convert}"\nthen give checkpoint={target}'
    )


def read_base(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        AdapterFileError: empty, cut short, of another kind, or unreadable.
    """
    if path.stat().st_size == 0:
        raise AdapterFileError(f"{path} is empty (0 bytes): copy or download it again.")
    return read_weights(path)[0]


def begin_at_zero(model: nn.Module, heads: Iterable[str]) -> None:
    """Fresh heads over pretrained layers, which then get no gradient through random numbers."""
    for head in heads:
        for parameter in model.get_submodule(head).parameters():
            nn.init.zeros_(parameter)
