"""Models that somebody has saved with timm: config.json and model.safetensors, on the hub or in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.errors import AdapterFileError, MissingFileError, did_you_mean
from lora_lightning.models.base_file import PICKLED
from lora_lightning.models.hub import WEIGHTS, hub_files, in_cache
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.mapping_file import read_values

with loading("timm"):
    import timm

CONFIG = "config.json"
HUB, FOLDER = re.compile(r"hf[-_]hub:(?!timm/)([\w.-]+/[\w.-]+)(?:@(.+))?"), re.compile(r"local[-_]dir:(.+)")
# Of what a file says of the data, all that is taken.
DATA = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "num_classes", "classifier",
        "first_conv", "fixed_input_size", "pool_size")  # fmt: skip
PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Saved:
    """What such a place holds.

    Attributes:
        architecture: a name of `timm.list_models()`.
        options: what the model was built with.
        data: of its pretrained_cfg: size, mean, number of classes, ….
        weights: the file; None where none was asked for.
    """

    architecture: str
    options: dict[str, Any]
    data: dict[str, Any]
    weights: Path | None


def is_saved(name: Any) -> bool:
    """Whether a name is that of such a place: hf-hub:USER/NAME or local-dir:FOLDER."""
    return isinstance(name, str) and bool(HUB.fullmatch(name) or FOLDER.fullmatch(name))


def saved_model(name: str, weights: bool, cache_dir: str | None = None) -> Saved:
    """What is saved under a name; only JSON and safetensors are read, and what they say is checked.

    Args:
        weights: whether they are needed too.
        cache_dir: in place of the hub's cache (HF_HOME).

    Raises:
        MissingFileError: it is not on this machine and cannot be had now.
        AdapterFileError: its weights are pickles; or the configuration is damaged, of another library, or
            holds more than plain options.
    """
    wanted = [CONFIG, WEIGHTS] if weights else [CONFIG]
    if hub := HUB.fullmatch(name):
        repo, revision = hub.groups()
        if weights and not in_cache(repo, WEIGHTS, revision, cache_dir):
            _refuse_pickles(
                name, [f for f in ("pytorch_model.bin",) if in_cache(repo, f, revision, cache_dir)]
            )
        files = hub_files(name, repo, wanted, f"weights/{WEIGHTS}", revision, cache_dir, "local-dir:weights")
    else:
        folder = Path(name.partition(":")[2]).expanduser()
        files = [folder / file for file in wanted]
        for file in files:
            if not file.is_file():
                siblings = sorted(f.name for f in folder.glob("*")) if folder.is_dir() else []
                if file.name == WEIGHTS:
                    _refuse_pickles(name, [f for f in siblings if f.endswith(PICKLED)])
                raise MissingFileError(
                    f"name={name}: there is no file {file}.{did_you_mean(file.name, siblings)} "
                    "Give a folder that has it."
                )
    return _read(files[0], files[1] if weights else None)


def _refuse_pickles(name: str, found: list[str]) -> None:
    if found:
        raise AdapterFileError(
            f"name={name}: has its weights in {', '.join(found)} alone, a pickle, which can run any code when"
            f" it is read; nothing was read. Convert it to {WEIGHTS}, and give model.checkpoint=FILE."
        )


def _read(file: Path, weights: Path | None) -> Saved:
    config = read_values(file, "Copy or download it again.")
    if not isinstance(config, Mapping) or not isinstance(name := config.get("architecture"), str):
        raise AdapterFileError(f"{file} is not timm's: it names no architecture. Give a model saved by timm.")
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise AdapterFileError(
            f"{file}: architecture={name!r} is no model of timm {timm.__version__}.{near} Upgrade timm."
        )
    about = config.get("pretrained_cfg") or config
    options = config.get("model_args") or {}
    data = {key: about[key] for key in DATA if key in about} if isinstance(about, Mapping) else {}
    data.setdefault("num_classes", config.get("num_classes", 1000))
    if not isinstance(options, Mapping):
        raise AdapterFileError(
            f"{file} is damaged: its model_args are no mapping. Copy or download it again."
        )
    odd = [str(key) for key, value in {**options, **data}.items() if not _is_plain(value)]
    odd += [
        key for key in options if re.match(r"pretrained|checkpoint_path|cache_dir|features_only", str(key))
    ]
    if odd:
        raise AdapterFileError(
            f"{file}: model_args: {', '.join(odd)}: is not taken from a file: what a model is built with are "
            "numbers, words and lists of them. Build it yourself: model.name=NAME model.checkpoint=FILE."
        )
    built = dict(options)
    classes = built.pop("num_classes", data["num_classes"])
    return Saved(name, built, {**data, "num_classes": classes}, weights)


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, list) and all(map(_is_plain, value)))
