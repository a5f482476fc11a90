"""shrink: an adapter's updates by the best ones of lower rank, after training."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Annotated

import torch
from torch import nn

from lora_lightning.adapters.inject import refuse_merged, replace
from lora_lightning.adapters.state import (
    Adapter,
    extra_tensors,
    state_of,
    update_of,
    value_for,
    viewed_as_plain,
)
from lora_lightning.config import LoRAConfig
from lora_lightning.methods.shortening import (
    Approximation,
    Energy,
    Rank,
    one_limit,
    plainly,
    shortened,
    write_update,
)
from lora_lightning.planning.patterns import naming
from lora_lightning.planning.plan import LayerPlan, Plan
from lora_lightning.planning.targets import assemble
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import at_least
from lora_lightning.utils.names import submodule


def shrink(
    model: nn.Module,
    *,
    rank: Rank = None,
    energy: Energy = None,
    budget: Annotated[int | None, at_least(1, note="parameters of all updates together")] = None,
    adapter: str | None = None,
) -> Approximation:
    """Put the best updates of lower rank in the place of an adapter's, by QR decompositions of the factors
    and the singular values of an r × r matrix; nothing dense is formed.

    The adapter keeps its name, scaling, heads, norms and biases, and whether it is selected. Updates that
    hold nothing, or that the budget has nothing for, are left out: their layers are as the base has them.
    The parameters are new ones: make an optimizer after shrinking.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        rank: the highest rank of each layer.
        energy: the part of Σσ² that each layer keeps, with the smallest rank that does.
        budget: parameters of all updates together, shared out for the least Σσ² that is lost in all.
        adapter: its name; None is the first selected one.

    Returns:
        The ranks, and the relative error of each layer; `print` it for a table.

    Raises:
        ConfigError: none or several of rank, energy and budget, or a bad one; an adapter with DoRA, whose
            update is no product of two thin matrices. The model is untouched.
        UserError: there is no such adapter, the model is not adapted, merged or sharded, or every update is
            zero.
    """
    require(shrink, locals(), [one_limit(rank=rank, energy=energy, budget=budget)])
    refuse_merged(model)
    state = state_of(model)
    name = state.adapter if adapter is None else adapter
    record = state.named(name)
    updates = {p.name: update_of(model, p, name) for p in record.plan.layers}
    short = shortened(
        record.config,
        record.plan.layers,
        {n: u.slot for n, u in updates.items()},
        {n: u.thin_factors() for n, u in updates.items()},
        rank,
        energy,
        budget,
    )
    own = extra_tensors(model, record.extra_trainables)
    values = {n: value_for(state, name, n, t).detach().clone() for n, t in own.items()}
    config, planned = _planned(model, record, short.layers)
    order = list(state.adapters)
    replace(model, config, planned, name)
    state.adapters = {n: state.adapters[n] for n in order}
    for layer in planned.layers:
        write_update(update_of(model, layer, name), *short.factors[layer.name])
    with torch.no_grad():
        for n, tensor in own.items():
            standing = tensor if name == state.adapter else state.adapters[name].values[n]
            standing.copy_(values[n])
    return short.told


def _planned(model: nn.Module, record: Adapter, layers: list[LayerPlan]) -> tuple[LoRAConfig, Plan]:
    backbone, kept = record.plan.backbone, {p.name for p in layers}
    prefix = f"{backbone}." if backbone else ""
    within = [
        changed(p, name=p.name.removeprefix(prefix), module=p.module.removeprefix(prefix)) for p in layers
    ]
    heads = [h.removeprefix(prefix) for h in record.plan.heads]
    gone = {p.name: "its update was shrunk away" for p in record.plan.layers if p.name not in kept}
    skipped = {n.removeprefix(prefix): reason for n, reason in {**record.plan.skipped, **gone}.items()}
    with viewed_as_plain(model):
        config = naming(plainly(record.config, layers), within, heads, submodule(model, backbone))
        return config, assemble(model, config, backbone, heads, within, skipped)
