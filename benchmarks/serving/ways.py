"""Ways of answering requests for many adapters, all behind the same reading, waiting and encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lightning as ll
from benchmarks.serving.shelves import RANK, Shape, loaded
from lora_lightning.serving.catalog import Catalog
from lora_lightning.serving.engine import Engine
from lora_lightning.serving.kinds import Facts, Kind
from lora_lightning.serving.store import AdapterStore

BATCH, WAIT_MS = 8, 5.0  # what the server has unless told otherwise


@dataclass(frozen=True, eq=False)
class Known:
    """An adapter of which the engine needs the name alone."""

    name: str
    facts: Facts


class Names:
    """In the store's place where nothing is kept apart from the models."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.known: dict[str, Known] = {}

    def get(self, name: str) -> Known:
        return self.known.setdefault(name, Known(name, self.facts))

    def residents(self) -> list[Any]:
        return []


class ByAdapter(Engine):
    """The requests of a batch in groups of one adapter each: the best that a server can do that has one
    adapter in a model at a time.

    Args:
        choose: makes a model ready for an adapter; gives what runs it.
    """

    def __init__(self, shape: Shape, kind: Kind, choose: Callable[[str], Kind], batch: int = BATCH) -> None:
        self.choose = choose
        store: Any = Names(shape.facts)
        super().__init__(kind, store, shape.facts, batch, WAIT_MS)

    def _outputs(self, batch: Sequence[Any]) -> list[Any]:
        groups: dict[str, list[int]] = {}
        for n, (job, _) in enumerate(batch):
            groups.setdefault(job.resident.name, []).append(n)
        found: dict[int, Any] = {}
        with torch.inference_mode():
            for name, places in groups.items():
                units = [batch[n][0].work.units[batch[n][1]][1] for n in places]
                found.update(zip(places, self.choose(name).run(units), strict=True))
        return [found[n] for n in range(len(batch))]


def mixed(shape: Shape, folder: Path, most: int, batch: int = BATCH, read: bool = False) -> Engine:
    """This library's.

    Args:
        read: have all that are kept in memory from the beginning, as the other ways have.
    """
    base = shape.base()
    store = AdapterStore(base.model, Catalog(folder), most, [f"a{i}" for i in range(most)] if read else [])
    return Engine(shape.kind(base), store, shape.facts, batch, WAIT_MS)


def switching(shape: Shape, folder: Path, count: int) -> Engine:
    """`set_adapter` of one model that holds all of them."""
    model = loaded(shape, folder, count)
    kind = shape.kind(shape.base(model))

    def choose(name: str) -> Kind:
        ll.set_adapter(model, name)
        return kind

    return ByAdapter(shape, kind, choose)


def loading(shape: Shape, folder: Path) -> Engine:
    """`load_adapter` of one model that holds one of them, and has the one before deleted."""
    model = shape.model().eval()
    kind = shape.kind(shape.base(model))
    now: list[str] = []

    def choose(name: str) -> Kind:
        if now != [name]:
            with torch.inference_mode(False):  # the weights are to be changed again
                ll.load_adapter(model, folder / name, name)
                ll.set_adapter(model, name)
                for before in now:
                    ll.delete_adapter(model, before)
            now[:] = [name]
        return kind

    return ByAdapter(shape, kind, choose)


def peft_switching(shape: Shape, folder: Path, count: int) -> Engine | None:
    """The same by PEFT's `set_adapter`, with adapters of its own in the same layers; None without PEFT."""
    try:
        import peft
    except ImportError:
        return None
    names = [p.module for p in ll.plan(shape.model(), ll.LoRAConfig(rank=RANK)).layers]
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(shape.model().eval(), settings, adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", settings)
    model.requires_grad_(False)
    kind = shape.kind(shape.base(model))

    def choose(name: str) -> Kind:
        model.set_adapter(name, inference_mode=True)
        return kind

    return ByAdapter(shape, kind, choose)


def a_model_each(shape: Shape, folder: Path, count: int, merged: bool) -> Engine:
    """A whole model for each adapter, as they are loaded or merged into plain layers."""
    kinds = {f"a{i}": kind_of(shape, folder / f"a{i}", merged) for i in range(count)}
    return ByAdapter(shape, kinds["a0"], kinds.__getitem__)


def kind_of(shape: Shape, adapter: Path, merged: bool) -> Kind:
    """A whole model with one adapter, merged into plain layers or not."""
    model: nn.Module = shape.model().eval()
    ll.load_adapter(model, adapter)
    if merged:
        ll.eject(model, merged=True)
    return shape.kind(shape.base(model))


class Hot(Engine):
    """This library's, with plain merged copies for some adapters, whose requests run by themselves.

    Args:
        merged: what runs the copies, by name.
    """

    def __init__(self, *args: Any, merged: dict[str, Kind]) -> None:
        self.merged = merged
        super().__init__(*args)

    def _outputs(self, batch: list[tuple[Any, int]]) -> list[Any]:
        found: dict[int, Any] = {}
        groups: dict[str, list[int]] = {}
        for n, (job, _) in enumerate(batch):
            name = job.resident.name
            groups.setdefault(name if name in self.merged else "", []).append(n)
        for name, places in groups.items():
            mine = [batch[n] for n in places]
            if name:
                with torch.inference_mode():
                    outputs = self.merged[name].run([job.work.units[i][1] for job, i in mine])
            else:
                outputs = super()._outputs(mine)
            found.update(zip(places, outputs, strict=True))
        return [found[n] for n in range(len(batch))]


def hot(shape: Shape, folder: Path, most: int, copies: int) -> Engine:
    """With merged copies of the first adapters, which Zipf's clients ask for most."""
    base = shape.base()
    store = AdapterStore(base.model, Catalog(folder), most, [f"a{i}" for i in range(most)])
    merged = {f"a{i}": kind_of(shape, folder / f"a{i}", merged=True) for i in range(copies)}
    return Hot(shape.kind(base), store, shape.facts, BATCH, WAIT_MS, merged=merged)
