"""An adapter wherever it is stored: a folder of ours or PEFT's, or a Trainer's checkpoint; and its run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lora_lightning.errors import AdapterFileError, UserError, did_you_mean
from lora_lightning.files.allowed import checked_facts
from lora_lightning.files.checkpoint_digests import KEY, check_digests
from lora_lightning.files.compatibility import check_tensors
from lora_lightning.files.format import VERSION, SavedAdapter, assembled, described
from lora_lightning.files.pair import LARGEST_CONFIG, is_peft, read_pair
from lora_lightning.files.peft_read import assembled_peft
from lora_lightning.layers.layer import slot_key
from lora_lightning.layers.update import LEAVES
from lora_lightning.planning.plan import Plan
from lora_lightning.utils.torch_file import read_torch

GIVE = "Give an adapter's folder or a Trainer's checkpoint."
RUN_FILE = "config.yaml"
FACTS_FILE = "provides.yaml"
ABOVE = 3  # folders between a run's folder and what it saved


@dataclass(frozen=True)
class AdapterSource:
    """An adapter and what stands around it.

    Attributes:
        kind: what it was read from.
        base_weights: the base's tensors by the adapter's names, where a checkpoint holds them too.
        run: folder of the training application's run, if it is one's.
    """

    path: Path
    kind: str
    saved: SavedAdapter
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    run: Path | None = None

    @property
    def run_file(self) -> Path | None:
        """The configuration of the run, if there is one."""
        return self.run / RUN_FILE if self.run else None

    def run_config(self) -> dict[str, Any]:
        """The run's configuration; empty without one.

        Raises:
            AdapterFileError: it is damaged, or holds more than plain values.
        """
        return _read_yaml(self.run / RUN_FILE) if self.run else {}

    def facts(self) -> dict[str, Any] | None:
        """What the run's data said of themselves; None where it is not known.

        Raises:
            AdapterFileError: the file is damaged, or holds more than plain values.
            UserError: it holds what is not run unasked.
        """
        path = self.run / FACTS_FILE if self.run else None
        return checked_facts(_read_yaml(path), path) if path and path.is_file() else None

    def recipe(self) -> str:
        """Name of the run's recipe; empty where it is not known."""
        choices = _yaml(self.run / ".hydra" / "hydra.yaml") if self.run else {}
        for key in ("hydra", "runtime", "choices", "recipe"):
            choices = choices.get(key, {}) if isinstance(choices, dict) else {}
        return choices if isinstance(choices, str) else ""


def read_any(folder: str | os.PathLike[str]) -> SavedAdapter:
    """An adapter's folder, of ours or of PEFT.

    Raises:
        AdapterFileError: it is neither, or damaged.
    """
    pair = read_pair(folder)
    return assembled_peft(pair, folder) if is_peft(pair[0]) else assembled(pair, folder)


def read_source(path: str | os.PathLike[str], adapter: str | None = None) -> AdapterSource:
    """An adapter's folder, or a Trainer's checkpoint that LoRACallback wrote.

    Args:
        adapter: which one of a checkpoint that holds several; None is the one that was selected.

    Raises:
        AdapterFileError: there is no adapter, or a damaged one; nothing in the file is executed.
    """
    path = Path(path)
    if path.is_dir():
        saved = read_any(path)
        check_tensors(saved, path)
        kind = "PEFT's format" if saved.foreign else "adapter folder"
        return AdapterSource(path, kind, saved, run=_run_of(path))
    checkpoint = load_checkpoint(path)
    saved, base_weights = from_checkpoint(checkpoint, str(path), adapter)
    check_tensors(saved, path)
    return AdapterSource(path, "Trainer checkpoint", saved, base_weights, _run_of(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A Trainer's checkpoint, read without running anything in it.

    Raises:
        AdapterFileError: it is missing, damaged, holds code, or is no Trainer's checkpoint.
    """
    checkpoint = read_torch(path, GIVE)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise AdapterFileError(f"{path} is not a Trainer's checkpoint: it has no state_dict.")
    if not isinstance(checkpoint.get(KEY), dict):
        raise AdapterFileError(f"{path} holds no adapter: it was not saved with LoRACallback.")
    check_digests(checkpoint, path)
    return checkpoint


def from_checkpoint(
    checkpoint: Mapping[str, Any], where: str, adapter: str | None = None
) -> tuple[SavedAdapter, dict[str, Tensor]]:
    """The adapter in a Trainer's checkpoint, and the base's tensors if they are in it too."""
    adapters, active = adapters_in(checkpoint, where)
    name = active[0] if adapter is None else adapter
    if name not in adapters:
        holds = ", ".join(adapters)
        raise UserError(f"adapter={name}: {where} holds {holds}.{did_you_mean(name, adapters)}")
    saved, about, state = adapters[name], checkpoint[KEY], _state(checkpoint)
    weights = [f"{p.module}.{saved.slots[p.name].parameter}".lstrip(".") for p in saved.plan.layers]
    whole = all(w in state for w in weights)
    top = f"{about['network']}." if about.get("network") else ""
    updates = {p for other, one in adapters.items() for p in _update_prefixes(one.plan, other).values()}
    base_weights = {
        n.removeprefix(top): t
        for n, t in state.items()
        if whole and n.startswith(top) and n.rpartition(".")[0] not in updates
    }
    return saved, base_weights


def adapters_in(checkpoint: Mapping[str, Any], where: str) -> tuple[dict[str, SavedAdapter], tuple[str, ...]]:
    """All adapters of a Trainer's checkpoint, and the names of those that were selected.

    Raises:
        AdapterFileError: of another version, or a value in the description is not of its kind.
    """
    about = checkpoint[KEY]
    if not isinstance(checkpoint.get("state_dict", {}), dict):
        raise AdapterFileError(f"{where} is not a Trainer's checkpoint: it has no state_dict.")
    if about.get("version") != VERSION:
        raise AdapterFileError(
            f"{where} has format version {about.get('version')!r}; this release of lora_lightning reads "
            f"version {VERSION}. Upgrade lora-lightning."
        )
    adapters, active = about.get("adapters"), about.get("active")
    if not (
        isinstance(adapters, dict)
        and all(isinstance(n, str) and n.isidentifier() for n in adapters)
        and isinstance(active, list)
        and active
        and all(isinstance(n, str) and n in adapters for n in active)
        and isinstance(about.get("network", ""), str)
    ):
        raise AdapterFileError(f"{where} is damaged: it does not say which adapters it holds.")
    return {n: _saved(n, chosen, checkpoint, where) for n, chosen in adapters.items()}, tuple(active)


def _saved(name: str, chosen: Any, checkpoint: Mapping[str, Any], where: str) -> SavedAdapter:
    if not (
        isinstance(chosen, dict)
        and isinstance(chosen.get("extra_trainables"), list)
        and all(isinstance(n, str) for n in chosen["extra_trainables"])
        and isinstance(chosen.get("values"), dict)
        and all(isinstance(t, Tensor) for t in chosen["values"].values())
    ):
        raise AdapterFileError(f"{where} is damaged: it does not say what was trained.")
    saved = described({**checkpoint[KEY], **chosen}, {}, where)
    state = _state(checkpoint)
    values = {**state, **chosen["values"]}
    tensors = {n: values[n] for n in chosen["extra_trainables"] if n in values}
    prefixes = _update_prefixes(saved.plan, name)
    for layer in saved.plan.layers:
        for part in LEAVES:
            if (stored := f"{prefixes[layer.name]}.{part}") in state:
                tensors[layer.tensor(part)] = state[stored]
    return replace(saved, tensors=tensors)


def _state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the checkpoint's state_dict, which strategies that shard have taken out, but for the
    empty ones that guard it."""
    state = checkpoint.get("state_dict", {})
    return {n: t for n, t in state.items() if isinstance(t, Tensor) and t.numel()}


def _update_prefixes(planned: Plan, adapter: str) -> dict[str, str]:
    """Where the update of each layer of an adapter stands in a checkpoint's state_dict, by its plan."""
    return {p.name: f"{p.module}.lora.{adapter}.{slot_key(p.slot)}".lstrip(".") for p in planned.layers}


def _run_of(path: Path) -> Path | None:
    folders = [path, *path.absolute().parents][: ABOVE + 1]
    return next((f for f in folders if _is_run(f / RUN_FILE)), None)


def _is_run(path: Path) -> bool:
    """Whether this is a run's configuration, be it damaged."""
    try:
        return "model" in _read_yaml(path)
    except AdapterFileError:
        with open(path, "rb") as file:
            return re.search(rb"^model\s*:", file.read(LARGEST_CONFIG), re.MULTILINE) is not None


def _yaml(path: Path) -> dict[str, Any]:
    """A mapping in a YAML file of plain values; empty when there is none."""
    try:
        return _read_yaml(path)
    except AdapterFileError:
        return {}


def _read_yaml(path: Path) -> dict[str, Any]:
    """A mapping in a YAML file of plain values; empty when there is no such file. Tags build nothing.

    Raises:
        AdapterFileError: it cannot be read, or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_CONFIG + 1)
        if len(text) > LARGEST_CONFIG:
            raise ValueError(f"larger than {LARGEST_CONFIG >> 20} MiB")
        values = yaml.safe_load(text.decode("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AdapterFileError(
            f"{path} cannot be read: {reason}. Nothing in it was run; it holds plain values alone."
        ) from None
    if values is not None and not isinstance(values, dict):
        raise AdapterFileError(f"{path} is damaged: it holds no mapping.")
    return values or {}
