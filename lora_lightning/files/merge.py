"""Merging without a model: an adapter and its base's weights made one plain state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.adapters.making import planned_update
from lora_lightning.errors import AdapterFileError, UserError
from lora_lightning.files.alignment import aligned
from lora_lightning.files.fingerprint import refusal_of_base
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.peft_resolve import with_beginning
from lora_lightning.kernels.quantized_tensor import QuantizedTensor, is_quantized
from lora_lightning.kernels.rounding import rounded
from lora_lightning.layers.update import LowRankUpdate, effective_weight
from lora_lightning.layers.weight_norm import normed_parts, normed_weight, parts_of
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.utils.digests import digests
from lora_lightning.utils.names import named_parameters
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import truncate_list


@dataclass(frozen=True)
class Merged:
    """A plain state dict and what the merging did to it.

    Attributes:
        state: names -> tensors, in the base's dtypes.
        weights: how many weights were changed by updates.
        largest: the largest absolute difference between a merged weight and the sum in float32.
        relative: Frobenius norm of all those differences over that of all updates.
        left_out: trained tensors outside the network.
    """

    state: dict[str, Tensor]
    weights: int
    largest: float
    relative: float
    left_out: list[str]


def merge_state(saved: SavedAdapter, base_weights: Mapping[str, Tensor], check_base: bool = True) -> Merged:
    """Add an adapter's updates to the weights of a state dict, and put its trained tensors in place.

    The sum is taken in float32 (float64 for such weights) and rounded to the weight's dtype once. Of a
    weight-normed layer g and v are written, under the names that they have in the base. Weights
    that were quantized while the adapter trained are rounded as they were then, and are floats again.

    Args:
        saved: from `read_source(...).saved` or `read_adapter`.
        base_weights: a state dict of the network, or of a module that holds it; it is not changed.
        check_base: refuse frozen weights with other values than those that it was trained on.

    Raises:
        AdapterFileError: the adapter does not fit the weights, or they are another base's.
        UserError: a merged weight would not be finite.
    """
    saved = aligned(saved, module_names(base_weights))
    _check(saved, base_weights, check_base)
    base_weights = {n: _as_trained(t, saved.quantized.get(n)) for n, t in base_weights.items()}
    saved = with_beginning(saved, lambda layer: base_weights[saved.weight_name(layer)], "the file")
    state = dict(base_weights)
    groups: dict[str, list[LayerPlan]] = {}
    for layer in saved.plan.layers:
        groups.setdefault(saved.weight_name(layer), []).append(layer)
    largest, lost, moved = 0.0, 0.0, 0.0
    for name, layers in working(groups.items(), "merging", "weights"):
        parts = normed_parts(base_weights, name)
        weight = normed_weight(*(base_weights[n] for n in parts)) if parts else base_weights[name]
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        total = effective_weight(wide, [_update(saved, layer, wide) for layer in layers])
        merged = rounded(total, weight.dtype)
        _refuse_not_finite(name, merged, weight)
        error = merged.to(wide.dtype) - total
        largest = max(largest, error.abs().max().item())
        lost += error.double().square().sum().item()
        moved += (total - wide).double().square().sum().item()
        if parts:
            state.update(zip(parts, parts_of(total, *(base_weights[n] for n in parts)), strict=True))
        else:
            state[name] = merged
    updates = saved.update_shapes()
    own = {n: t for n, t in saved.tensors.items() if n not in updates}
    tops = {n.split(".")[0] for n in base_weights} | {h.split(".")[0] for h in saved.plan.heads}
    left_out = [n for n in own if n.split(".")[0] not in tops]
    for name, tensor in own.items():
        if name not in left_out:
            state[name] = tensor.to(base_weights[name].dtype) if name in base_weights else tensor
            _refuse_not_finite(name, state[name], base_weights.get(name))
    return Merged(state, len(groups), largest, (lost / moved) ** 0.5 if moved else 0.0, left_out)


def _refuse_not_finite(name: str, merged: Tensor, weight: Tensor | None) -> None:
    """A base that holds infinity itself may keep it."""
    if not torch.isfinite(merged).all() and (weight is None or torch.isfinite(weight).all()):
        raise UserError(
            f"{name}: merged it would hold NaN or infinity. Nothing was written. Give an earlier adapter."
        )


def _as_trained(weight: Tensor, kind: str | None) -> Tensor:
    """The base's tensor as floats; where it was quantized while the adapter trained, rounded as then."""
    if kind and not is_quantized(weight):
        weight = QuantizedTensor.of(weight, kind)
    return weight.dequantize() if is_quantized(weight) else weight


def _check(saved: SavedAdapter, base_weights: Mapping[str, Tensor], check_base: bool) -> None:
    problems = []
    for layer in saved.plan.layers:
        name = saved.weight_name(layer)
        if (parts := normed_parts(base_weights, name)) is not None:
            name = parts[1]  # v has the shape of the weight
        if name not in base_weights:
            computed = any(n.startswith(f"{layer.module}.parametrizations.") for n in base_weights)
            remedy = " (it is computed: merge with eject(model, merged=True))" if computed else ""
            problems.append(f"no weight {name}{remedy}")
        elif not base_weights[name].is_floating_point():
            problems.append(f"{name} is {base_weights[name].dtype}")
        elif saved.slots[layer.name].shape(base_weights[name]) != layer.shape:
            problems.append(f"{name} is {tuple(base_weights[name].shape)}, in the adapter {layer.shape}")
        elif shared := [
            n
            for n, t in base_weights.items()
            if n != name and t.data_ptr() == base_weights[name].data_ptr() != 0
        ]:
            problems.append(f"{name} is also {shared[0]}: merge the model itself, eject(model, merged=True)")
    shapes = saved.update_shapes()
    problems += [f"the adapter lacks {n}" for n in shapes if n not in saved.tensors]
    problems += [
        f"{n} is {tuple(saved.tensors[n].shape)}, not {s}"
        for n, s in shapes.items()
        if n in saved.tensors and tuple(saved.tensors[n].shape) != s
    ]
    if problems:
        raise AdapterFileError(
            f"the adapter does not fit the base's weights: {truncate_list(problems, most=3)}. "
            "Give the base that it was trained on."
        )
    refusal = refusal_of_base(saved.fingerprint, digests(base_weights), "the adapter")
    if refusal and check_base:
        raise AdapterFileError(refusal)


def _update(saved: SavedAdapter, layer: LayerPlan, weight: Tensor) -> LowRankUpdate:
    slot = saved.slots[layer.name]
    update = planned_update(slot.of(weight), slot, layer, saved.config).requires_grad_(False)
    for part, parameter in named_parameters(update).items():
        parameter.copy_(saved.tensors[layer.tensor(part)])
    return update


def module_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the modules that the tensors of a state dict lie in."""
    parts = [n.split(".") for n in state]
    return list(dict.fromkeys(".".join(p[:i]) for p in parts for i in range(len(p))))
