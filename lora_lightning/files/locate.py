"""An adapter wherever it is stored, a folder of ours or PEFT's or a Trainer's checkpoint, and its run."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.errors import AdapterFileError, UserError
from lora_lightning.files.allowed import checked_facts, plain_values
from lora_lightning.files.checkpoint_digests import KEY
from lora_lightning.files.checkpoint_read import adapter_in, read_checkpoint, require_adapter
from lora_lightning.files.compatibility import check_tensors
from lora_lightning.files.format import SavedAdapter, assembled
from lora_lightning.files.hubs.fetch import fetched
from lora_lightning.files.origin import SECTIONS, Origin, is_place
from lora_lightning.files.pair import CONFIG_FILE, is_peft, read_pair
from lora_lightning.files.peft_read import assembled_peft
from lora_lightning.files.weights import about_in, read_weights
from lora_lightning.utils.mapping_file import LARGEST, NOTHING_RUN, read_mapping
from lora_lightning.utils.tables import truncate_list

GIVE = "Give an adapter's folder or a Trainer's checkpoint."
RUN_FILE = "config.yaml"
FACTS_FILE = "provides.yaml"
ADAPTER, WEIGHTS = "adapter", "model.safetensors"  # in a run's folder
BEST = Path("checkpoints", "best.ckpt")  # in the folder of a method, which has saved nothing else
CHECKPOINT = "Trainer checkpoint"
ABOVE = 3  # folders between a run's folder and what it saved


@dataclass(frozen=True)
class Source:
    """Trained weights wherever they are stored, and what stands around them.

    Attributes:
        kind: what it was read from.
        came_with: what the file itself says of its origin.
    """

    path: Path
    kind: str
    came_with: Origin

    @property
    def run(self) -> Path | None:
        """The folder of the training application's run, if the file lies in one."""
        return _run_of(self.path)

    @property
    def config_file(self) -> Path | None:
        """The file that says how the model is built, if one does: the adapter's own or the run's."""
        if self.came_with.config:
            return self._described_in()
        return self.run / RUN_FILE if self.run else None

    def config(self) -> dict[str, Any]:
        """The configuration that came with the adapter, else the run's; empty without one.

        Raises:
            AdapterFileError: it is damaged, or holds more than plain values.
        """
        if self.came_with.config:
            return self.came_with.config
        return read_mapping(self.run / RUN_FILE, NOTHING_RUN) if self.run else {}

    def run_data(self) -> dict[str, Any] | None:
        """The section `data` of the run, which also says where the data lie, plain; paths that were relative
        to the folder where the run was started are whole. None without a run.

        Raises:
            AdapterFileError, UserError: it is damaged, or holds more than plain values.
        """
        if not self.run:
            return None
        file = self.run / RUN_FILE
        data = plain_values(read_mapping(file, NOTHING_RUN), "data", file)
        started = Path(str(self._runtime().get("cwd", "")))
        return {k: _whole(k, v, started) for k, v in data.items()} if isinstance(data, dict) else None

    def facts(self) -> dict[str, Any] | None:
        """What data and task said of themselves, as it came with the adapter, else with the run; None where
        it is not known.

        Raises:
            AdapterFileError: the file is damaged, or holds more than plain values.
            UserError: it holds what is not run unasked.
        """
        if self.came_with.facts:
            return checked_facts(self.came_with.facts, self._described_in())
        path = self.run / FACTS_FILE if self.run else None
        return checked_facts(read_mapping(path, NOTHING_RUN), path) if path and path.is_file() else None

    def origin(self) -> Origin:
        """What travels on with the weights: what came with the adapter, else what its run says; nothing where
        that is more than plain values."""
        if self.came_with or not self.run:
            return self.came_with
        with contextlib.suppress(UserError):
            config = self.config()
            plain = {name: plain_values(config, name, self.config_file) for name in SECTIONS}
            return Origin.of_run(self.recipe(), plain, self.facts() or {})
        return Origin()

    def base_folders(self) -> list[Path]:
        """Where random weights may be kept to which the adapter is added."""
        return [folder for folder in (self.path if self.path.is_dir() else None, self.run) if folder]

    def recipe(self) -> str:
        """Name of the recipe; empty where it is not known."""
        if self.came_with.recipe:
            return self.came_with.recipe
        choices = self._runtime().get("choices")
        name = choices.get("recipe") if isinstance(choices, dict) else None
        return name if isinstance(name, str) else ""

    def method(self) -> str:
        """By which the run has trained; empty where it is not known."""
        found: Any = ""
        if self.run:
            with contextlib.suppress(AdapterFileError):
                found = read_mapping(self.run / RUN_FILE, NOTHING_RUN).get("method")
        return found if isinstance(found, str) else ""

    def _runtime(self) -> dict[str, Any]:
        """What Hydra knew of the run; empty where it is not there."""
        found: Any = {}
        if self.run:
            with contextlib.suppress(AdapterFileError):
                found = read_mapping(self.run / ".hydra" / "hydra.yaml", NOTHING_RUN)
        for key in ("hydra", "runtime"):
            found = found.get(key, {}) if isinstance(found, dict) else {}
        return found if isinstance(found, dict) else {}

    def _described_in(self) -> Path:
        return self.path / CONFIG_FILE if self.path.is_dir() else self.path


@dataclass(frozen=True)
class AdapterSource(Source):
    """An adapter: a folder of ours or PEFT's, or in a Trainer's checkpoint.

    Attributes:
        base_weights: the base's tensors by the adapter's names, where a checkpoint holds them too.
    """

    saved: SavedAdapter
    base_weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightsSource(Source):
    """All weights of a network: of a run, merged, or of a Trainer's checkpoint without an adapter.

    Attributes:
        weights: under their names in the file.
        about: what else the file's metadata say.
    """

    weights: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)


def read_any(folder: str | os.PathLike[str]) -> SavedAdapter:
    """An adapter's folder, of ours or of PEFT, or its address on a hub.

    Raises:
        AdapterFileError: it is neither, or damaged.
    """
    folder = fetched(folder)
    pair = read_pair(folder)
    return assembled_peft(pair, folder) if is_peft(pair[0]) else assembled(pair, folder)


def read_source(path: str | os.PathLike[str], adapter: str | None = None) -> AdapterSource:
    """An adapter's folder or its address on a hub, or a Trainer's checkpoint that LoRACallback wrote.

    Args:
        adapter: which one of a checkpoint that holds several; None is the one that was selected.

    Raises:
        AdapterFileError: there is no adapter, or a damaged one; nothing in the file is executed.
    """
    path = fetched(path)
    if path.is_dir():
        saved = read_any(path)
        check_tensors(saved, path)
        kind = "PEFT's format" if saved.foreign else "adapter folder"
        return AdapterSource(path, kind, saved.origin, saved)
    checkpoint = read_checkpoint(path, GIVE)
    require_adapter(checkpoint, path, GIVE)
    saved, base_weights = adapter_in(checkpoint, str(path), adapter)
    check_tensors(saved, path)
    return AdapterSource(path, CHECKPOINT, saved.origin, saved, base_weights)


def read_trained(path: str | os.PathLike[str]) -> AdapterSource | WeightsSource:
    """Whatever a run has saved: an adapter's folder, a Trainer's checkpoint with or without an adapter, all
    weights as `.safetensors`; the run's folder, whose adapter or weights are meant, or that of a method of
    `compare`, whose best checkpoint is; or an address on a hub.

    Raises:
        AdapterFileError: there is nothing of the kind, or it is damaged; nothing in the file is executed.
    """
    path = fetched(path)
    if path.is_dir() and not (path / CONFIG_FILE).exists():
        path = next((p for name in _saved_names(path) if (p := path / name).exists()), path)
        if path.is_dir() and path.name != ADAPTER and not (path / RUN_FILE).exists():
            path = best if (best := path / BEST).is_file() else path
    if path.is_dir() and not (path / CONFIG_FILE).exists():
        several = sorted(str(file.parent) for file in path.glob(f"*/{ADAPTER}/{CONFIG_FILE}"))
        if several:
            raise AdapterFileError(
                f"{path} is a run of several adapters. Give one: {truncate_list(several)}."
            )
    if path.suffix == ".safetensors" and path.is_file():
        tensors, metadata = read_weights(path)
        return WeightsSource(path, "weights", origin_in(metadata, path), tensors, about_in(metadata, path))
    if path.is_file():
        checkpoint = read_checkpoint(path, GIVE)
        if KEY not in checkpoint:
            return WeightsSource(path, CHECKPOINT, Origin(), _tensors(checkpoint["state_dict"]))
    return read_source(path)


def _saved_names(run: Path) -> tuple[str, ...]:
    """What a run may have saved, first what its method saves: a folder that was used twice has both."""
    with contextlib.suppress(AdapterFileError):
        if (run / RUN_FILE).is_file() and read_mapping(run / RUN_FILE, NOTHING_RUN).get("method") == "full":
            return WEIGHTS, ADAPTER
    return ADAPTER, WEIGHTS


def origin_in(metadata: Mapping[str, str], where: Path) -> Origin:
    """What the metadata of a safetensors file say of its origin.

    Raises:
        AdapterFileError: it is of another kind.
    """
    try:
        return Origin.read(json.loads(metadata.get("lora_lightning", "{}")).get("origin", {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"{where} is damaged: {error}.") from None


def _whole(option: str, value: Any, started: Path) -> Any:
    """A path of the data that is there from the folder where a run was started."""
    if not is_place(option, value) or not value or not started.is_absolute():
        return value
    with contextlib.suppress(OSError, ValueError):  # too long for a name
        return str(started / value) if (started / value).exists() else value
    return value


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _run_of(path: Path) -> Path | None:
    folders = [path, *path.absolute().parents][: ABOVE + 1]
    return next((f for f in folders if _is_run(f / RUN_FILE)), None)


def _is_run(path: Path) -> bool:
    """Whether this is a run's configuration, be it damaged."""
    if not path.is_file():
        return False
    try:
        return "model" in read_mapping(path, NOTHING_RUN)
    except AdapterFileError:
        with open(path, "rb") as file:
            return re.search(rb"^model\s*:", file.read(LARGEST), re.MULTILINE) is not None
