"""Whether an adapter from a file fits a model: names, shapes, numbers and base, before anything changes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lora_lightning.adapters.inject import extra_names
from lora_lightning.adapters.state import extra_tensors, is_injected, state_of, viewed_as_plain
from lora_lightning.errors import AdapterFileError, did_you_mean
from lora_lightning.files.alignment import aligned
from lora_lightning.files.fingerprint import fingerprint_of, refusal_of_base
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.peft_resolve import in_model, only_trained, with_beginning
from lora_lightning.layers.slot import Slot, read_weight
from lora_lightning.planning.plan import LayerPlan, Plan
from lora_lightning.planning.structure import Target, targets_of
from lora_lightning.planning.targets import loose_parameters
from lora_lightning.utils.names import (
    named_buffers,
    named_modules,
    named_parameters,
    submodule,
)


def fitted(saved: SavedAdapter, model: nn.Module, where: str | os.PathLike[str]) -> SavedAdapter:
    """The adapter with names of this plain model; what a file of PEFT leaves open is settled.

    Raises:
        AdapterFileError: a layer that PEFT computes in another way than its weight says.
    """
    saved = aligned(saved, list(named_modules(model)))
    if not saved.foreign:
        return saved
    saved = in_model(saved, model, where)
    if _misfits(model, saved.plan, saved.slots):
        return saved  # named by check_fit
    if any(p.is_meta for p in model.parameters()):
        return saved  # refused by check_fit
    saved = with_beginning(saved, partial(_weight_of, model), where)
    base: dict[str, Tensor] = {**named_parameters(model), **named_buffers(model)}
    if is_injected(model):
        base.update(state_of(model).originals)
    return only_trained(saved, extra_names(model, saved.config, saved.plan), base)


def _weight_of(model: nn.Module, layer: LayerPlan) -> Tensor:
    """Of a plain model, the weight that a planned layer of one weight updates."""
    return read_weight(submodule(model, layer.module), "weight")


def check_fit(
    model: nn.Module,
    saved: SavedAdapter,
    where: str | os.PathLike[str],
    check_base: bool = True,
    present: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse an adapter that is not for this model.

    Args:
        model: adapted or not.
        saved: with names of this model.
        check_base: whether frozen weights with other values are refused.
        present: tensors of the model's adapter that is to take the values, under the names of a file.

    Raises:
        AdapterFileError: a layer, head or tensor does not fit, or the base is another one.
    """
    if any(p.is_meta for p in model.parameters()):
        raise AdapterFileError(
            f"the model is on the meta device and cannot hold what {where} contains: give it memory and "
            "load its own weights first."
        )
    with viewed_as_plain(model):
        refuse(_misfits(model, saved.plan, saved.slots), where)
        own = extra_tensors(model, extra_names(model, saved.config, saved.plan))
    if is_injected(model) and (ours := state_of(model).plan.backbone) != saved.plan.backbone:
        refuse([f"backbone {ours!r} in the model, {saved.plan.backbone!r} in the file"], where)
    shapes = saved.update_shapes()
    if present is not None:
        own = {n: t for n, t in present.items() if n not in shapes}
    refuse(_tensor_problems(saved.tensors, shapes, own), where)
    refuse(not_finite(saved.tensors), where)
    if check_base and (
        refusal := refusal_of_base(saved.fingerprint, fingerprint_of(model), f"the adapter in {where}")
    ):
        raise AdapterFileError(refusal)


def check_plan(model: nn.Module, saved: SavedAdapter, where: str | os.PathLike[str]) -> None:
    """Refuse an adapter of a Trainer's checkpoint before anything is built by its plan: where it has layers
    that the model has not, or updates of other shapes than the plan says.

    Args:
        saved: with names of this model; without updates where a strategy has taken them out.

    Raises:
        AdapterFileError: it is such an adapter.
    """
    with viewed_as_plain(model):
        refuse(_misfits(model, saved.plan, saved.slots), where)
        own = extra_tensors(model, saved.tensors)
    if saved.update_names() & saved.tensors.keys():
        check_tensors(saved, where, own)


def check_tensors(
    saved: SavedAdapter, where: str | os.PathLike[str], own: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse an adapter whose updates have other shapes than its plan says, or that holds NaN or infinity.

    Args:
        own: the model's own tensors that it trains, if there is a model.

    Raises:
        AdapterFileError: it is such an adapter.
    """
    shapes = saved.update_shapes()
    own = {n: t for n, t in (own or {}).items() if n not in shapes}
    known = {*shapes, *own, *saved.update_names()}
    found = {n: t for n, t in saved.tensors.items() if n in known}
    refuse(_tensor_problems(found, shapes, own), where)
    refuse(not_finite(found), where)


def _misfits(model: nn.Module, planned: Plan, slots: dict[str, Slot]) -> list[str]:
    modules = named_modules(model)
    targets, refused = targets_of(model)
    places = {*modules, *loose_parameters(model)}
    problems = [f"no module {n}" for n in planned.heads if n not in places]
    if planned.backbone and planned.backbone not in modules:
        problems.append(f"no backbone {planned.backbone}")
    counts = Counter(p.name for p in planned.layers)
    problems += [f"{n} stands twice in the plan" for n, count in counts.items() if count > 1]
    for layer in planned.layers:
        if layer.module in refused:
            problems.append(f"{layer.module}: {refused[layer.module]}")
        elif layer.name not in targets or _place(targets[layer.name]) != (layer.module, layer.slot):
            problems.append(f"no layer {layer.name}{did_you_mean(layer.name, targets)}")
        elif (shape := targets[layer.name].shape) != layer.shape:
            problems.append(f"{layer.name}: weight {shape}, in the file {layer.shape}")
        elif (here := targets[layer.name].slot) != slots[layer.name]:
            problems.append(f"{layer.name}: {here} in the model, {slots[layer.name]} in the file")
    return problems


def _place(target: Target) -> tuple[str, str]:
    return target.module, target.slot_name


def _tensor_problems(
    found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Tensor]
) -> list[str]:
    expected = {**shapes, **{n: tuple(t.shape) for n, t in own.items()}}
    problems = [f"{n} is missing in the file" for n in expected if n not in found]
    problems += [f"{n} has no place in the model" for n in found if n not in expected]
    both = [n for n in expected if n in found]
    problems += [
        f"{n}: {expected[n]} in the model, {tuple(found[n].shape)} in the file"
        for n in both
        if expected[n] != tuple(found[n].shape)
    ]
    problems += [
        f"{n} is {found[n].dtype} in the file"
        for n in both
        if (not found[n].is_floating_point() if n in shapes else not _same_kind(found[n], own[n]))
    ]
    return problems


def _same_kind(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype or (one.is_floating_point() and other.is_floating_point())


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """A diverged update, head, norm or statistic: it cannot be used, nor merged."""
    return [f"{n} holds NaN or infinity" for n, t in tensors.items() if not torch.isfinite(t).all()]


def refuse(problems: list[str], where: str | os.PathLike[str]) -> None:
    """Raise an AdapterFileError with the first of the problems, if there is one."""
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise AdapterFileError(
            f"the adapter in {where} does not fit this model: {'; '.join(problems[:3])}{more}. "
            "Build the model as it was when this was saved."
        )
