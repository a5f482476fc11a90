"""Extracting an adapter: what fine-tuning changed of a base, as low-rank updates and whole tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_lightning.adapters.inject import apply_plan, check_adapter, extra_names
from lora_lightning.adapters.state import extra_tensors, state_of, update_of
from lora_lightning.adapters.tuned_twin import Twin, resize, tuned_twin
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError
from lora_lightning.kernels.quantized_tensor import is_quantized
from lora_lightning.layers.norm import has_statistics, is_norm
from lora_lightning.layers.registry import slots_of
from lora_lightning.layers.slot import read_weight
from lora_lightning.methods.shortening import (
    Approximated,
    Approximation,
    approximated,
    chosen_ranks,
    cost_of,
    plainly,
    write_update,
)
from lora_lightning.methods.truncation import decomposed
from lora_lightning.planning.patterns import naming
from lora_lightning.planning.plan import LayerPlan, Plan
from lora_lightning.planning.targets import assemble, inside_backbone, loose_parameters, plan
from lora_lightning.utils.names import (
    inside,
    joined,
    named_buffers,
    named_modules,
    named_parameters,
    submodule,
)
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import truncate_list


@dataclass(frozen=True)
class Layer:
    """A layer that fine-tuning has changed, and the factors that are kept of it."""

    planned: LayerPlan
    factors: tuple[Tensor, Tensor]
    told: Approximated


def extract(
    base: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    rank: int | None,
    energy: float | None,
    adapter: str,
    modules_to_save: str | list[str] | None,
    backbone: str | None,
) -> Approximation:
    """`files.extract.extract_lora` for a state dict.

    Args:
        where: the state dict, for errors.

    Raises:
        ConfigError, AdapterFileError: as `extract_lora`; the base is untouched.
    """
    if any(is_quantized(p) for p in base.parameters()):
        raise ConfigError([
            "base: its weights are quantized. Extract from the floats, save the adapter, and load it into "
            "the quantized model."
        ])  # fmt: skip
    begun = LoRAConfig(target_modules="all", modules_to_save=modules_to_save, backbone=backbone)
    everything = plan(base, begun)
    check_adapter(base, begun, adapter)
    twin = tuned_twin(base, state, everything.heads, where)
    whole = working(everything.layers, "extracting", "layers")
    layers = [found for p in whole if (found := _extracted(base, twin, p, rank, energy, where))]
    kept = [one for one in layers if one.told.rank]
    changed = _changed(base, twin.model, everything)
    if not kept and not changed:
        raise ConfigError([f"{where}: nothing in it differs from the base. Give fine-tuned weights."])
    config, planned = _planned(twin.model, everything, begun, changed, [one.planned for one in kept], where)
    for name in twin.resized:
        resize(base, name, tuple(named_parameters(twin.model)[name].shape))
    apply_plan(base, config, planned, adapter)
    for one in kept:
        layer = next(p for p in planned.layers if p.name == one.planned.name)
        write_update(update_of(base, layer, adapter), *one.factors)
    own = extra_tensors(base, state_of(base).adapters[adapter].extra_trainables)
    values = extra_tensors(twin.model, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(values[name])
    state_of(base).begun = True
    notes = _notes(config, planned, changed, len(everything.layers) - len(layers), twin)
    return Approximation(tuple(one.told for one in layers), tuple(notes))


def _extracted(
    base: nn.Module, twin: Twin, layer: LayerPlan, rank: int | None, energy: float | None, where: str
) -> Layer | None:
    """The change of one layer and what is kept of it; None where nothing has changed. One dense matrix is
    there at a time."""
    module = submodule(base, layer.module)
    slot = slots_of(layer.module, module)[layer.slot]
    before = read_weight(module, slot.parameter).detach()
    after = read_weight(submodule(twin.model, layer.module), slot.parameter).detach()
    if not _differs(before, after):
        return None
    change = after.to(before.device).double() - _as_stored(before, after).double()
    if not torch.isfinite(change).all():
        raise ConfigError([
            f"{where}: {layer.name} holds NaN or infinity: the fine-tuning diverged. Give weights of "
            "before that."
        ])  # fmt: skip
    groups, cost = slot.groups, cost_of(slot, layer.shape)
    whole = decomposed(change.reshape(groups, layer.shape[0] // groups, -1), rank)
    kept = chosen_ranks({layer.name: whole}, {layer.name: cost}, rank, energy)[layer.name]
    planned = replace(layer, rank=kept, alpha=float(kept), parameters=kept * cost, asked=None)
    left, right = whole.factors(kept)
    if before.dtype != torch.float64:
        left, right = left.float(), right.float()
    return Layer(planned, (left, right), approximated(layer.name, layer.shape, whole, kept, cost))


def _as_stored(before: Tensor, after: Tensor) -> Tensor:
    """The base's tensor rounded as the fine-tuned one is: what rounding alone has changed is no training."""
    if before.is_floating_point() and after.dtype.itemsize < before.dtype.itemsize:
        return before.to(after.dtype)
    return before


def _differs(before: Tensor, after: Tensor) -> bool:
    stored = _as_stored(before, after)
    return stored.shape != after.shape or not torch.equal(stored, after.to(before.device, stored.dtype))


def _planned(
    model: nn.Module,
    everything: Plan,
    begun: LoRAConfig,
    changed: list[str],
    layers: list[LayerPlan],
    where: str,
) -> tuple[LoRAConfig, Plan]:
    """The configuration and the plan of an adapter that holds these updates, and all else that differs.

    Args:
        model: the fine-tuned one.
        changed: from `_changed`.

    Raises:
        ConfigError: something differs that no adapter holds.
    """
    prefix = f"{everything.backbone}." if everything.backbone else ""
    heads = [h for h in everything.heads if any(inside(n, [h]) for n in changed)]
    rest = [n for n in changed if n.startswith(prefix) and not inside(n, heads)]
    modules, adapted = named_modules(model), {p.module for p in layers}
    norms = {n for n in rest if is_norm(modules[_owner(n)]) or has_statistics(modules[_owner(n)])}
    biases = [n for n in rest if n not in norms and "bias" in n.rpartition(".")[2]]
    loose = loose_parameters(model)
    for name in (n for n in rest if n not in norms and n not in biases):
        owner = _owner(name)
        if name in loose:
            heads.append(name)
        elif not any(inside(module, [owner]) for module in adapted):
            heads.append(owner)
    order = [*modules, *loose]
    heads = sorted({*heads}, key=order.index)
    statistics = norms & named_buffers(model).keys()
    affine = norms - statistics
    own = all(n.endswith(".bias") and _owner(n) in adapted for n in biases)
    config = replace(
        plainly(begun, layers),
        train_bias="none" if not biases else "lora_only" if own else "all",
        train_norm="both"
        if affine and statistics
        else "affine"
        if affine
        else "stats"
        if statistics
        else "frozen",
        modules_to_save=None,
    )
    within = [
        replace(p, name=p.name.removeprefix(prefix), module=p.module.removeprefix(prefix)) for p in layers
    ]
    names = {p.name for p in layers}
    skipped = {p.name: "as the base has it" for p in everything.layers if p.name not in names}
    skipped = {n.removeprefix(prefix): reason for n, reason in {**everything.skipped, **skipped}.items()}
    heads = [h.removeprefix(prefix) for h in heads]
    config = naming(config, within, heads, submodule(model, everything.backbone))
    planned = assemble(model, config, everything.backbone, heads, within, skipped)
    held = extra_names(model, config, planned)
    if lost := [n for n in changed if n not in held]:
        raise ConfigError([
            f"{where}: {truncate_list(lost)} differ from the base, and no adapter holds them: let what "
            "lies outside the backbone train (requires_grad), and copy buffers that are no running "
            "statistics into the base first."
        ])  # fmt: skip
    return config, planned


def _changed(base: nn.Module, model: nn.Module, everything: Plan) -> list[str]:
    """Names of the tensors that differ and are not weights of layers, which get updates."""
    before: dict[str, Tensor] = {**named_parameters(base), **named_buffers(base)}
    after: dict[str, Tensor] = {**named_parameters(model, all_names=True), **named_buffers(model)}
    slots = {p.name: slots_of(p.module, submodule(base, p.module))[p.slot] for p in everything.layers}
    weights = [
        joined(p.module, f"{kind}{slots[p.name].parameter}")
        for p in everything.layers
        for kind in ("", "parametrizations.")
    ]
    return [n for n, t in before.items() if not inside(n, weights) and _differs(t, after[n])]


def _owner(name: str) -> str:
    """The module that has a tensor, not the parametrization of its weight."""
    return (
        name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    )


def _notes(
    config: LoRAConfig, planned: Plan, changed: list[str], unchanged: int, twin: Twin
) -> Iterator[str]:
    if planned.heads:
        yield f"kept whole: {truncate_list(planned.heads)}"
    if outside := [n for n in changed if not inside_backbone(n, planned.backbone)]:
        tops = list(dict.fromkeys(n.split(".")[0] for n in outside))
        yield f"kept whole, outside {planned.backbone}: {truncate_list(tops)}"
    if config.train_norm != "frozen":
        yield f"kept whole: norms ({config.train_norm})"
    if config.train_bias != "none":
        yield f"kept whole: biases ({config.train_bias})"
    for name, shape in twin.resized.items():
        now = named_parameters(twin.model)[name].shape
        yield f"{name}: {shape[0]} rows in the base, {now[0]} now, which are zero where the adapter is off"
    if unchanged:
        yield f"as the base has them: {unchanged} layers"
    if twin.foreign:
        yield f"beside the network, left out: {truncate_list(twin.foreign)}"
