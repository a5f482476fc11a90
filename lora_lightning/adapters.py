"""Adapters at work: switching off, merging into the weights and out again, their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.inject import WHOLE, injection_of, swap_originals
from lora_lightning.layers import LoRALayer, lora_layers
from lora_lightning.sharding import refuse_sharded


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of every update (A, B and DoRA's magnitude), in the order of the layers."""
    return [p for layer in lora_layers(model).values() for p in layer.lora.parameters()]


def merge(model: nn.Module) -> None:
    """Add the active updates into the weights, so that inference costs what the base model's does.

    The sum is taken in float32 or better and rounded to the weight's dtype. Each base weight is kept
    beside it for `unmerge`. Merging a merged model changes nothing.

    Raises:
        UserError: the model is not adapted or sharded, or an update is not finite; no layer is merged.
    """
    refuse_sharded(model, "merge", WHOLE)
    layers = {n: layer for n, layer in _layers_of(model).items() if not layer.merged}
    merged: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        try:
            merged[name] = layer.merged_weights()
        except UserError as error:
            raise UserError(f"{name}: {error}. No layer was merged.") from None
    for name, layer in layers.items():
        layer.merge_updates(merged[name])


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is back, bit for bit. Does nothing when nothing is merged.

    Raises:
        UserError: the model is not adapted.
    """
    for layer in _layers_of(model).values():
        if layer.merged:
            layer.unmerge_updates()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context the model is the base model, bit for bit: no update is added, merged
    weights are unmerged, and heads, norms and biases have the values of before training.

    Raises:
        UserError: the model is not adapted, or sharded.
    """
    layers, injection = lora_layers(model), injection_of(model)
    refuse_sharded(model, "adapters_off", WHOLE)
    active = {n: layer.lora_active for n, layer in layers.items()}
    merged = {n: layer.present_weights() for n, layer in layers.items() if layer.merged}
    for name, layer in layers.items():
        if name in merged:
            layer.unmerge_updates()
        layer.lora_active = ()
    swap_originals(model, injection)
    try:
        yield
    finally:
        swap_originals(model, injection)
        for name, layer in layers.items():
            layer.lora_active = active[name]
            if name in merged:
                layer.merge_updates(merged[name])


def _layers_of(model: nn.Module) -> dict[str, LoRALayer]:
    layers = lora_layers(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no adapted layer: call lora_lightning.inject(model) first."
        )
    return layers
