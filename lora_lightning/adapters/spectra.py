"""spectra: singular values, ranks and norms of the updates in a model."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.inject import refuse_choosing
from lora_lightning.adapters.state import state_of, update_of
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.slot import Slot
from lora_lightning.methods.spectra import Spectra, spectra_of
from lora_lightning.utils.names import submodule


def spectra(model: nn.Module, adapter: str | None = None) -> Spectra:
    """The singular values, effective rank, stable rank and norm of each update of an adapter, by matrices of
    its rank: cheap enough for every epoch. With DoRA they are those of s·B·A, before the magnitudes.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        adapter: None is the first selected one.

    Returns:
        A dictionary by the names of the layers; `print` it for a table.

    Raises:
        UserError: the model is not adapted, merged or sharded, or has no such adapter.
    """
    refuse_choosing(model, "spectra")
    return spectra_now(model, adapter)


@torch.no_grad()
def spectra_now(
    model: nn.Module, adapter: str | None = None, norms: dict[str, Tensor] | None = None
) -> Spectra:
    """`spectra` of a model that is known to be neither merged nor sharded.

    Args:
        norms: of the base weights, by layer, as far as they are known; the others come to it.
    """
    state = state_of(model)
    name = state.adapter if adapter is None else adapter
    factors, weights = {}, {} if norms is None else norms
    for layer in state.named(name).plan.layers:
        update = update_of(model, layer, name)
        factors[layer.name] = update.thin_factors()
        if layer.name not in weights:
            weights[layer.name] = norm_of(submodule(model, layer.module), update.slot)
    return spectra_of(factors, weights)


def norm_of(module: nn.Module, slot: Slot) -> Tensor:
    """‖W‖_F of the rows that a slot of an adapted layer means, in float32 or better."""
    layer = cast(LoRALayer, module)
    weight = layer.base_weight(slot.parameter)
    return slot.of(weight.to(torch.promote_types(weight.dtype, torch.float32))).norm()
