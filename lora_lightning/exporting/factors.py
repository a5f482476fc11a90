"""A base whose adapters go in beside its inputs: the factors of every update, and what is trained in full."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lora_lightning.adapters.eject import eject
from lora_lightning.adapters.manage import adapter_names, set_adapter, unmerge
from lora_lightning.adapters.state import extra_tensors, state_of, update_of
from lora_lightning.errors import UserError
from lora_lightning.exporting.open_layers import OPEN, Factors, Held, Open, tensor_of
from lora_lightning.exporting.subject import (
    Axes,
    Flat,
    Subject,
    copied,
    enlarged,
    in_floats,
    normalization,
    output_names,
)
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.layers.writing import settle
from lora_lightning.utils.names import joined, submodule
from lora_lightning.utils.tables import truncate_list

DOWN, UP = "lora_A", "lora_B"  # leaves of the names of inputs


@dataclass(frozen=True)
class OpenSubject(Subject):
    """A base that takes adapters as inputs, behind those of its own.

    Attributes:
        computed: recurrent modules whose weights are computed in each call.
        defaults: what the inputs of adapters are without one: updates of zero, of rank 1, and the base's own
            heads, norms and biases.
        adapters: what they are with each, by its name; what it leaves out is as without one.
    """

    computed: tuple[str, ...]
    defaults: dict[str, Tensor]
    adapters: dict[str, dict[str, Tensor]]


@torch.no_grad()
def opened(
    model: nn.Module, inputs: Mapping[str, Tensor], dynamic: Axes, shown: Mapping[str, Any] | None
) -> OpenSubject:
    """A base with open places for every adapter of a model, which is left as it is.

    Args:
        inputs: an example, as `subject_of` takes it.

    Raises:
        UserError: the model is not adapted, or an adapter is no sum of a base weight and a product; named.
    """
    inputs = {name: enlarged(tensor, dynamic.get(name, {})) for name, tensor in inputs.items()}
    twin = copied(model).eval().cpu()
    names = adapter_names(twin)
    unmerge(twin)
    updates = {name: _updates(twin, name) for name in names}
    trained = {name: _trained(twin, name) for name in names}
    set_adapter(twin, names[0])
    eject(twin)
    in_floats(twin)
    network = twin.eval().requires_grad_(False)
    _settle(network, {name for found in updates.values() for name in found})
    flat = Flat(network, list(inputs), normalization(shown)).eval()
    outputs = output_names(network, flat, inputs)
    places = list(dict.fromkeys(name for found in updates.values() for name in found))
    called = _called(flat, inputs)
    branches = [name for name in places if _has_branch(network, name, called)]
    weights = [name for name in places if name not in branches]
    whole = _whole(network, trained)
    defaults, examples, axes = _places(network, inputs, updates, branches, weights)
    values = {name: tensor_of(network, name).clone() for name in whole}
    adapters = {
        name: {k: t for n, f in found.items() for k, t in _shaped(network, n, f, n in branches).items()}
        | {n: t for n, t in trained[name].items() if n in whole}
        for name, found in updates.items()
    }
    computed = tuple(
        path
        for path in dict.fromkeys(name.rpartition(".")[0] for name in (*weights, *whole))
        if isinstance(submodule(network, path), nn.RNNBase)
    )
    return OpenSubject(
        _open(flat, len(inputs), branches, weights, whole),
        network,
        {**inputs, **examples, **values},
        {**dynamic, **axes},
        outputs,
        computed,
        defaults | values,
        adapters,
    )


def _open(flat: Flat, own: int, branches: list[str], weights: list[str], whole: list[str]) -> Open:
    """The network, those layers open that add a branch."""
    held, paths = Held(), [name.rpartition(".")[0] for name in branches]
    for path in paths:
        layer = submodule(flat.network, path)
        layer.__dict__.update(held=held, path=path)
        layer.__class__ = OPEN[type(layer)]
    return Open(flat, own, paths, weights, whole, held).eval()


def _places(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    updates: Mapping[str, Mapping[str, Factors]],
    branches: list[str],
    weights: list[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Axes]:
    """Of the inputs of every update: what they are without one, an example, and the axis of the rank."""
    defaults: dict[str, Tensor] = {}
    examples: dict[str, Tensor] = {}
    axes: Axes = {}
    taken = {size for tensor in inputs.values() for size in tensor.shape}
    ranks = (size for size in itertools.count(2) if size not in taken)  # axes of one size would become one
    for number, name in enumerate((*branches, *weights)):
        left, right = next(found[name] for found in updates.values() if name in found)
        none = left[..., :1] * 0, right[..., :1, :] * 0
        rank = next(ranks)
        some = none[0].repeat(1, 1, rank), none[1].repeat(1, rank, 1)
        empty, example = (_shaped(network, name, f, name in branches) for f in (none, some))
        for key in empty:
            sizes = zip(empty[key].shape, example[key].shape, strict=True)
            axes[key] = {i: f"rank_{number}" for i, (one, many) in enumerate(sizes) if one != many}
        defaults |= empty
        examples |= example
    return defaults, examples, axes


def _updates(model: nn.Module, adapter: str) -> dict[str, Factors]:
    """The factors of an adapter, by the parameter: those of several slots of one side by side.

    Raises:
        UserError: it is DoRA, whose weight is no such sum.
    """
    found: dict[str, Factors] = {}
    dora = []
    for planned in state_of(model).adapters[adapter].plan.layers:
        update = update_of(model, planned, adapter)
        name = joined(planned.module, update.slot.parameter)
        if update.lora_magnitude is not None:
            dora.append(name)
            continue
        rows = submodule(model, planned.module)
        factors = _over_all_rows(update, cast(Any, rows).base_weight(update.slot.parameter).shape[0])
        if name in found:
            factors = (torch.cat((found[name][0], factors[0]), 2), torch.cat((found[name][1], factors[1]), 1))
        found[name] = factors
    if dora:
        raise UserError(
            f"export: adapter {adapter!r} is DoRA in {truncate_list(dora)}, which no product added to the "
            "base gives: take format='onnx', a merged file for each adapter."
        )
    return found


def _over_all_rows(update: LowRankUpdate, rows: int) -> Factors:
    """The factors of an update; of one of some rows, the others are zero."""
    left, right = (factor.detach().float().clone() for factor in update.thin_factors())
    if update.slot.out_range is not None:
        first, last = update.slot.out_range
        left = F.pad(left, [0, 0, first, rows - last])
    return left, right


def _trained(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What an adapter trains in full, by name."""
    set_adapter(model, adapter)
    names = state_of(model).adapters[adapter].extra_trainables
    found = extra_tensors(model, names)
    return {n: t.detach().float().clone() for n, t in found.items() if t.is_floating_point()}


def _settle(network: nn.Module, names: Iterable[str]) -> None:
    """Weights that are computed, as of weight norm, as plain parameters."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = submodule(network, path)
        if is_parametrized(module, leaf):
            settle(module, leaf, keep_value=True)


def _called(flat: Flat, inputs: Mapping[str, Tensor]) -> set[nn.Module]:
    """The modules whose forward is called; others are read."""
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(module))
        for module in flat.modules()
        if type(module) in OPEN
    ]
    try:
        flat(*inputs.values())
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _has_branch(network: nn.Module, name: str, called: set[nn.Module]) -> bool:
    """Whether a layer adds its update by a branch: of torch's own classes, called, of one group."""
    path, _, leaf = name.rpartition(".")
    module = submodule(network, path)
    plain = type(module) in OPEN and getattr(module, "groups", 1) == 1
    return plain and leaf == "weight" and module in called


def _shaped(network: nn.Module, name: str, factors: Factors, branch: bool) -> dict[str, Tensor]:
    """Factors as the base takes them, by the names of its inputs."""
    left, right = factors
    if not branch:
        return {f"{name}.{UP}": left.contiguous(), f"{name}.{DOWN}": right.contiguous()}
    path = name.rpartition(".")[0]
    module = submodule(network, path)
    if isinstance(module, nn.Linear):
        return {f"{path}.{DOWN}": right[0].T.contiguous(), f"{path}.{UP}": left[0].T.contiguous()}
    weight = cast(nn.Conv2d, module).weight
    down = right[0].reshape(-1, *weight.shape[1:]).contiguous()
    up = left[0].reshape(len(weight), -1, *[1] * (weight.dim() - 2)).contiguous()
    return {f"{path}.{DOWN}": down, f"{path}.{UP}": up}


def _whole(network: nn.Module, trained: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """What some adapter has trained in full, away from the base's values."""
    names = dict.fromkeys(name for found in trained.values() for name in found)
    return [
        name
        for name in names
        if any(
            n == name and not torch.equal(t, tensor_of(network, n))
            for f in trained.values()
            for n, t in f.items()
        )
    ]
