"""Adapters of one base read from folders and kept apart from the model, checked as `load_adapter` checks."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import nn

from lora_lightning.adapters.parking import Parked, hold_nothing, park, parked_like
from lora_lightning.adapters.state import is_injected
from lora_lightning.errors import AdapterFileError
from lora_lightning.files.alignment import aligned
from lora_lightning.files.allowed import checked_facts
from lora_lightning.files.compatibility import check_fit, check_tensors, fitted
from lora_lightning.files.fingerprint import fingerprint_of, refusal_of_base
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.locate import read_any
from lora_lightning.files.pair import CONFIG_FILE
from lora_lightning.files.save_load import load_saved
from lora_lightning.layers.slot import Slot
from lora_lightning.utils.names import named_modules

NOTHING = "nothing"  # the adapter that stays selected, which changes nothing
KINDS = 8  # plans of which a sample is kept


@dataclass
class Read:
    """What was read of a folder, before the model is looked at."""

    folder: str
    saved: SavedAdapter
    facts: dict[str, Any]


class Parking:
    """Reads adapters for one model, which begins plain and holds none of them: `adapters.parking.put_back`
    puts one in.

    The first adapter of a plan is loaded into the model and taken out again. Another one of the same layers,
    ranks and heads is checked against that one, in a tenth of the time. Not for several threads at once.

    Args:
        model: the plain base.
        check_base: refuse adapters that were trained on other frozen weights.
    """

    def __init__(self, model: nn.Module, check_base: bool = True) -> None:
        if is_injected(model):
            raise ValueError("the model is adapted")
        self.model, self.check_base = model, check_base
        self.modules = list(named_modules(model))
        self.fingerprint = fingerprint_of(model) if check_base else {}
        self._kinds: list[tuple[dict[str, Slot], Parked]] = []
        self._numbers = count()

    @staticmethod
    def read(folder: str | os.PathLike[str]) -> Read:
        """The files of a folder, checked by themselves; the model is not looked at.

        Raises:
            AdapterFileError: they are missing, damaged or foreign.
            UserError: they would have something run.
        """
        saved = read_any(folder)
        check_tensors(saved, folder)
        return Read(str(folder), saved, checked_facts(saved.origin.facts, os.path.join(folder, CONFIG_FILE)))

    def take(self, read: Read, within: AbstractContextManager[Any] | None = None) -> Parked:
        """The adapter as this model can have it. The model is as it was when it is done.

        Args:
            within: is entered while the model is changed.

        Raises:
            AdapterFileError: it is for another model or base.
        """
        saved, name = read.saved, f"a{next(self._numbers)}"
        if not saved.foreign:
            saved = aligned(saved, self.modules)
            if other := self._alike(saved):
                return self._like(other, name, saved, read.folder)
        with within or nullcontext():
            if not is_injected(self.model):
                first = fitted(saved, self.model, read.folder)
                check_fit(self.model, first, read.folder, self.check_base)
                hold_nothing(self.model, first.config, first.plan, NOTHING)
            load_saved(self.model, saved, read.folder, name, self.check_base)
            parked = park(self.model, name)
        self._kinds = [(saved.slots, parked), *self._kinds][:KINDS]
        return parked

    def _alike(self, saved: SavedAdapter) -> Parked | None:
        for slots, parked in self._kinds:
            record = parked.record
            if record.plan == saved.plan and record.config == saved.config and slots == saved.slots:
                return parked
        return None

    def _like(self, other: Parked, name: str, saved: SavedAdapter, folder: str) -> Parked:
        check_tensors(saved, folder, other.record.values)
        refusal = self.check_base and refusal_of_base(
            saved.fingerprint, self.fingerprint, f"the adapter in {folder}"
        )
        if refusal:
            raise AdapterFileError(refusal)
        values = {n: saved.tensors[n].to(t) for n, t in other.record.values.items()}
        return parked_like(other, name, saved.tensors, values)
