"""An adapter wherever it is stored, a folder of ours or PEFT's or a Trainer's checkpoint, and its run."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.errors import AdapterFileError, UserError
from lora_lightning.files.allowed import checked_facts, plain_values
from lora_lightning.files.checkpoint_read import adapter_in, read_checkpoint, require_adapter
from lora_lightning.files.compatibility import check_tensors
from lora_lightning.files.format import SavedAdapter, assembled
from lora_lightning.files.origin import SECTIONS, Origin
from lora_lightning.files.pair import CONFIG_FILE, is_peft, read_pair
from lora_lightning.files.peft_read import assembled_peft
from lora_lightning.utils.mapping_file import LARGEST, NOTHING_RUN, read_mapping

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
    def config_file(self) -> Path | None:
        """The file that says how the model is built, if one does: the adapter's own or the run's."""
        if self.saved.origin.config:
            return self.path / CONFIG_FILE
        return self.run / RUN_FILE if self.run else None

    def config(self) -> dict[str, Any]:
        """The configuration that came with the adapter, else the run's; empty without one.

        Raises:
            AdapterFileError: it is damaged, or holds more than plain values.
        """
        if self.saved.origin.config:
            return self.saved.origin.config
        return read_mapping(self.run / RUN_FILE, NOTHING_RUN) if self.run else {}

    def facts(self) -> dict[str, Any] | None:
        """What data and task said of themselves, as it came with the adapter, else with the run; None where
        it is not known.

        Raises:
            AdapterFileError: the file is damaged, or holds more than plain values.
            UserError: it holds what is not run unasked.
        """
        if self.saved.origin.facts:
            return checked_facts(self.saved.origin.facts, self.path / CONFIG_FILE)
        path = self.run / FACTS_FILE if self.run else None
        return checked_facts(read_mapping(path, NOTHING_RUN), path) if path and path.is_file() else None

    def origin(self) -> Origin:
        """What travels on with the weights: what came with the adapter, else what its run says; nothing where
        that is more than plain values."""
        if self.saved.origin or not self.run:
            return self.saved.origin
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
        if self.saved.origin.recipe:
            return self.saved.origin.recipe
        choices: Any = {}
        if self.run:
            with contextlib.suppress(AdapterFileError):
                choices = read_mapping(self.run / ".hydra" / "hydra.yaml", NOTHING_RUN)
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
    checkpoint = read_checkpoint(path, GIVE)
    require_adapter(checkpoint, path, GIVE)
    saved, base_weights = adapter_in(checkpoint, str(path), adapter)
    check_tensors(saved, path)
    return AdapterSource(path, "Trainer checkpoint", saved, base_weights, _run_of(path))


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
