"""Adapters at work: added, selected, deleted, switched off, merged into the weights and out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.inject import activate, check_name, drop, grow, refuse_merged
from lora_lightning.layers import LoRALayer, lora_layers
from lora_lightning.peft_config import config_of
from lora_lightning.plans import Plan
from lora_lightning.record import as_before, injection_of, put_adapter_values, put_base_values
from lora_lightning.report import listed
from lora_lightning.sharding import refuse_sharded
from lora_lightning.targets import plan


def add_adapter(model: nn.Module, name: str, config: LoRAConfig | None = None) -> Plan:
    """Give an adapted model one more adapter, with updates, heads, norms and biases of its own that
    begin as the base's. It is not selected.

    What trains outside the backbone begins as it stands now.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        name: an identifier that no adapter of the model has.
        config: its layers, ranks and heads may differ from the other adapters'; the backbone may not.
            None is the configuration of the model's first adapter.

    Returns:
        The plan that was carried out.

    Raises:
        ConfigError: the name is taken or no identifier; or as `plan`. The model is untouched.
        UserError: the model is not adapted, or merged.
    """
    refuse_merged(model)
    injection = injection_of(model)
    config = next(iter(injection.adapters.values())).config if config is None else config_of(config)
    check_name(name)
    if name in injection.adapters:
        raise ConfigError([
            f"name={name!r}: the model has an adapter of this name. Give another name, or call "
            f"lora_lightning.delete_adapter(model, {name!r}) first."
        ])  # fmt: skip
    with as_before(model):
        planned = plan(model, config)
    if planned.scope != injection.plan.scope:
        raise ConfigError([
            f"backbone={config.backbone!r}: every adapter of a model has the same backbone, here "
            f"{injection.plan.scope!r}."
        ])  # fmt: skip
    grow(model, config, planned, name)
    return planned


def select(model: nn.Module, *names: str) -> None:
    """Use these adapters: the sum of their updates is added, and they train; the others are silent.

    Heads, norms and biases have the values of the first named, and train as its configuration says.
    An optimizer keeps the parameters that it was given: make it after selecting.

    Raises:
        UserError: an unknown name, none, or one twice; the model is not adapted, or merged.
    """
    refuse_merged(model)
    injection = injection_of(model)
    if len(names) == 1 and isinstance(names[0], (list, tuple)):
        raise UserError(
            f"select: {names[0]!r} is a list: give the names one by one, as in "
            f"select(model, {', '.join(map(repr, names[0])) or repr(injection.adapter)})."
        )
    for name in names:
        injection.named(name)
    if not names or len({*names}) < len(names):
        raise UserError(
            f"select{names!r}: name one or several adapters, each once, of {', '.join(injection.adapters)}; "
            "for the base model there is lora_lightning.adapters_off(model)."
        )
    activate(model, names)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter that is not selected. Layers that no other adapter updates are plain again.

    Raises:
        UserError: there is no such adapter, or it is selected; the model is not adapted, or merged.
    """
    refuse_merged(model)
    injection = injection_of(model)
    injection.named(name)
    if name in injection.active:
        others = [n for n in injection.adapters if n not in injection.active]
        remedy = f"select(model, {others[0]!r}) first" if others else "eject(model) gives the base model back"
        raise UserError(f"adapter {name!r} is selected and cannot be deleted: lora_lightning.{remedy}.")
    drop(model, name)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, in the order in which they were added.

    Raises:
        UserError: the model is not adapted.
    """
    return list(injection_of(model).adapters)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of the selected adapters' updates (A, B and DoRA's magnitude), in the order of the
    layers."""
    return [
        parameter
        for layer in lora_layers(model).values()
        for adapter in layer.lora_active
        for parameter in layer.lora[adapter].parameters()
    ]


def merge(model: nn.Module) -> None:
    """Add the active updates into the weights, so that inference costs what the base model's does.

    The sum is taken in float32 or better and rounded to the weight's dtype. Each base weight is kept
    beside it for `unmerge`. Merging a merged model changes nothing.

    Raises:
        UserError: the model is not adapted or sharded, or an update is not finite; no layer is merged.
    """
    refuse_sharded(model, "merge")
    layers = {n: layer for n, layer in _layers_of(model).items() if not layer.merged}
    merged: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        try:
            merged[name] = layer.merged_weights()
        except UserError as error:
            raise UserError(f"{name}: {error}. No layer was merged.") from None
    hidden = [f"{n}.{w}".lstrip(".") for n, layer in layers.items() for w in layer.merge_updates(merged[n])]
    if hidden:
        rank_zero_warn(
            f"{listed(hidden)}: its parametrization (spectral norm, for example) has no values that give the "
            "merged weight: the model computes with it, but its state_dict() holds the base's. To save the "
            "merged weights call lora_lightning.eject(model, merged=True) instead."
        )


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
        UserError: the model is not adapted or sharded, or within such a context already.
    """
    refuse_sharded(model, "adapters_off")
    layers, injection = lora_layers(model), injection_of(model)
    injection.settled()
    active = {n: layer.lora_active for n, layer in layers.items()}
    merged = {n: layer.present_weights() for n, layer in layers.items() if layer.merged}
    for name, layer in layers.items():
        if name in merged:
            layer.unmerge_updates()
        layer.lora_active = ()
    put_base_values(model)
    injection.within = "adapters_off"
    try:
        yield
    finally:
        injection.within = ""
        put_adapter_values(model)
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
