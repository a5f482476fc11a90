"""A mixture of a model's adapters as one more adapter, of which the weights train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from lora_lightning.adapters.combine import averages, check_sources, collect, planned_sum
from lora_lightning.adapters.combine_methods import Sum
from lora_lightning.adapters.inject import attach_adapter, refuse_merged
from lora_lightning.adapters.state import state_of, update_of
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.layers.factors import put_sides
from lora_lightning.layers.mixture import MixtureUpdate
from lora_lightning.planning.plan import LayerPlan, Plan


def mixture(model: nn.Module, names: Sequence[str], into: str) -> Plan:
    """Give an adapted model one more adapter that is Σᵢ wᵢ·Δᵢ of the named ones' updates Δᵢ, with weights wᵢ
    of each layer that are above 0 and of sum 1 (`layers.mixture.MixtureUpdate`). It is not selected.

    The weights begin equal and alone train; the Δᵢ are copies, so that the adapters that they are of may
    change or go. Heads, norms and biases that the adapters have of their own begin as their averages, and
    train. Select it, then train it: by hand, or by `LoRACallback(adapter=into)`. It is saved, loaded, merged
    and written for PEFT like any; `combine(model, [into], [1.0], "plain")` makes a plain adapter of it.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        names: two or more adapters of the model.
        into: name of the new adapter.

    Returns:
        The plan of the new adapter.

    Raises:
        UserError: an adapter that the model does not have; the model is not adapted, or merged.
        ConfigError: bad options, every problem at once; an adapter with DoRA, whose update is no product of
            two thin matrices. The model is untouched.
    """
    refuse_merged(model)
    if isinstance(names, str) or len({*names}) < max(2, len(names)):
        raise ConfigError([f"names={names!r}: give a list of two or more adapters, each once."])
    state = state_of(model)
    records = [state.named(name) for name in names]
    equal = [1 / len(names)] * len(names)
    check_sources(model, records, names, equal, into)
    sums = collect(model, names, records)
    config, planned = planned_sum(
        model, records, sums, {n: sum(_ranks(s, len(names))) for n, s in sums.items()}
    )
    config, planned = replace(config, regularizer={}), _mixed(planned, sums, names)
    values = averages(model, names, equal, config, planned)
    attach_adapter(model, config, planned, into)
    for layer in planned.layers:
        _write(cast(MixtureUpdate, update_of(model, layer, into)), sums[layer.name])
    state.adapters[into].values.update(values)
    return planned


def mixture_weights(model: nn.Module, adapter: str | None = None) -> dict[str, dict[str, float]]:
    """The weights of a mixture: by layer, and there by the name that each adapter had.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        adapter: None is the first selected one.

    Raises:
        UserError: there is no such adapter, or it is no mixture; the model is not adapted.
    """
    state = state_of(model)
    name = state.adapter if adapter is None else adapter
    layers = [layer for layer in state.named(name).plan.layers if layer.mixed]
    if not layers:
        raise UserError(
            f"adapter {name!r} is no mixture: make one by lora_lightning.mixture(model, names, into)."
        )
    return {layer.name: _weights(model, layer, name) for layer in layers}


def _weights(model: nn.Module, layer: LayerPlan, adapter: str) -> dict[str, float]:
    values = cast(MixtureUpdate, update_of(model, layer, adapter)).weights().tolist()
    return dict(zip((name for name, _ in layer.mixed), values, strict=True))


def _ranks(total: Sum, count: int) -> list[int]:
    """The rank that each adapter has in a place."""
    return [sum(right.shape[1] for j, _, right in total.terms if j == i) for i in range(count)]


def _mixed(planned: Plan, sums: dict[str, Sum], names: Sequence[str]) -> Plan:
    """The plan of a sum with its terms, whose weights alone train."""
    layers = [
        replace(
            p, mixed=tuple(zip(names, _ranks(sums[p.name], len(names)), strict=True)), parameters=len(names)
        )
        for p in planned.layers
    ]
    added = len(names) * len(layers)
    trained = planned.trainable - sum(p.parameters for p in planned.layers) + added
    return replace(planned, layers=layers, trainable=trained, total=planned.total + added)


@torch.no_grad()
def _write(update: MixtureUpdate, total: Sum) -> None:
    """Put the terms side by side, in the order of the adapters."""
    terms = sorted(total.terms, key=lambda term: term[0])
    left, right = torch.cat([t[1] for t in terms], dim=2), torch.cat([t[2] for t in terms], dim=1)
    put_sides(update.slot, left, right, update.lora_A, update.lora_B)
