"""Names of an adapter's file made names of a model that holds the network one level up or down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
from torch import nn

from lora_lightning.files.format import SavedAdapter
from lora_lightning.planning.patterns import renamed_in
from lora_lightning.planning.plan import Plan
from lora_lightning.utils.names import inside, joined, named_children

Rename = Callable[[str], str]


def aligned(saved: SavedAdapter, modules: Iterable[str]) -> SavedAdapter:
    """Names of the file made names of a model that may hold the network one level up or down, as a
    LightningModule holds it as `self.model`.

    Args:
        modules: names of the model's modules.
    """
    heads = [h for h in saved.plan.heads if h not in saved.tensors]  # those are parameters, not modules
    rename = alignment([*[p.module for p in saved.plan.layers], *heads], list(modules))
    return renamed(saved, rename) if rename else saved


def alignment(names: list[str], modules: list[str]) -> Rename | None:
    """How to rename so that all these names are modules; None when they are already, or cannot be."""
    known = set(modules)

    def fits(rename: Rename) -> bool:
        return {rename(n) for n in names} <= known

    if fits(lambda n: n):
        return None
    first = names[0].split(".")[0] if names else ""
    renames: list[Rename] = []
    if all(n == first or n.startswith(f"{first}.") for n in names):
        renames.append(lambda n: n.removeprefix(f"{first}.") if n != first else "")
    renames += [partial(joined, m) for m in modules if m and "." not in m]
    return next((r for r in renames if fits(r)), None)


def renamed(saved: SavedAdapter, rename: Rename) -> SavedAdapter:
    """The same adapter for a model whose modules have other names."""
    names = [*[p.name for p in saved.plan.layers], *saved.plan.heads]
    return replace(
        saved,
        config=renamed_in(saved.config, names, rename),
        plan=saved.plan.renamed(rename),
        tensors={rename(n): t for n, t in saved.tensors.items()},
        slots={rename(n): s for n, s in saved.slots.items()},
        fingerprint={rename(n): d for n, d in saved.fingerprint.items()},
        quantized={rename(n): kind for n, kind in saved.quantized.items()},
    )


def network_of(model: nn.Module, planned: Plan) -> str:
    """Name of the network in a LightningModule that holds all of a plan; "" is the model itself."""
    names = [*[p.module for p in planned.layers], *planned.heads]
    if not isinstance(model, pl.LightningModule) or not names:
        return ""
    return next((c for c in named_children(model) if all(inside(n, [c]) for n in names)), "")
