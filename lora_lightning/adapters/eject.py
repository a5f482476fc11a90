"""eject: the way back from an adapted model to a plain one, as it was before or with what was trained."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.adapters.base_values import leave_base, refuse_meta, refuse_replaced, replaced
from lora_lightning.adapters.state import put_base_values, state_of
from lora_lightning.layers.layer import restore
from lora_lightning.layers.norm import FrozenNorm
from lora_lightning.layers.registry import lora_layers
from lora_lightning.layers.swap import swap_out
from lora_lightning.layers.viewed import hide_all
from lora_lightning.layers.writing import set_weights
from lora_lightning.utils.names import joined, named_modules, named_parameters, unwrapped
from lora_lightning.utils.sharding import refuse_sharded
from lora_lightning.utils.tables import truncate_list


def eject(model: nn.Module, *, merged: bool = False) -> None:
    """Give back the model of before: its classes, `requires_grad` flags and values.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        merged: keep what was trained: the selected updates are added to the weights, heads and norms
            keep their trained values. The result is a plain model that needs nothing of this package. A
            weight-normed layer stays one, its g and v give the merged weight.

    Raises:
        UserError: the model is not adapted or sharded, or an update to be merged is not finite or gone with
            a module that was replaced.
    """
    refuse_sharded(model, "eject")
    state = state_of(model)
    state.require_no_context()
    if merged:
        refuse_replaced(model)
        refuse_meta(model, "eject(merged=True)")
    hide_all(state.choice)
    weights = {n: layer.merged_weights() for n, layer in lora_layers(model).items()} if merged else {}
    gone = replaced(model)
    state.originals = {n: t for n, t in state.originals.items() if n.rpartition(".")[0] not in gone}
    leave_base(model)
    plain: list[str] = []
    for name, layer in lora_layers(model).items():
        if layer.lora_merged:
            layer.unmerge_updates()
        restore(layer)
        if merged:
            plain += [joined(name, w) for w in set_weights(layer, weights[name])]
    modules = named_modules(model)
    for name, mode in state.training.items():
        if isinstance(norm := modules.get(name), FrozenNorm):
            swap_out(norm)
            norm.train(mode and model.training)  # a model in eval mode stays in it
    if not merged:
        put_base_values(model)
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
    del unwrapped(model).lora_state
    if plain:
        rank_zero_warn(
            f"{truncate_list(plain)} are plain parameters now: no values of their parametrizations "
            "(spectral norm, "
            "for example) give the merged weights. Load them into a model without these parametrizations."
        )
