"""Adapters at work: added, selected, deleted, switched off, merged into the weights and out again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.adapters.base_values import begin_updates, refuse_meta, refuse_replaced
from lora_lightning.adapters.inject import (
    activate,
    attach_adapter,
    check_name,
    refuse_choosing,
    refuse_merged,
    remove_adapter,
)
from lora_lightning.adapters.state import state_of, view_as, viewed_as_plain
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.layers.registry import LoRALayer, lora_layers
from lora_lightning.layers.viewed import show
from lora_lightning.layers.views import Held, View, hold, opened
from lora_lightning.planning.peft_config import config_of
from lora_lightning.planning.plan import Plan
from lora_lightning.planning.targets import plan
from lora_lightning.utils.names import joined
from lora_lightning.utils.sharding import refuse_sharded
from lora_lightning.utils.tables import truncate_list


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
    state = state_of(model)
    config = next(iter(state.adapters.values())).config if config is None else config_of(config)
    check_name(name)
    if config.by_data:
        raise ConfigError([
            f"{config.by_data}: decided by data on a model that is not adapted yet: give a rank and an init "
            "that need none, or inject such an adapter first."
        ])  # fmt: skip
    if name in state.adapters:
        raise ConfigError([
            f"name={name!r}: the model has an adapter of this name. Give another name, or call "
            f"lora_lightning.delete_adapter(model, {name!r}) first."
        ])  # fmt: skip
    with viewed_as_plain(model):
        planned = plan(model, config)
    if planned.backbone != state.plan.backbone:
        raise ConfigError([
            f"backbone={config.backbone!r}: every adapter of a model has the same backbone: give "
            f"{state.plan.backbone!r}."
        ])  # fmt: skip
    attach_adapter(model, config, planned, name)
    return planned


def set_adapter(model: nn.Module, *names: str) -> None:
    """Use these adapters: the sum of their updates is added, and they train; the others are silent.

    Heads, norms and biases have the values of the first named, and train as its configuration says.
    An optimizer keeps the parameters that it was given: make it after selecting.

    In the thread, and asyncio task, in which the model was adapted (or fitted last by a Trainer) this is the
    model's own choice, which holds for everybody who has made none. Anywhere else it holds for the calling
    thread or task alone, and says nothing of what trains.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        *names: of its adapters, one or several.

    Raises:
        UserError: an unknown name, none, or one twice; the model is not adapted, or merged, or within
            `adapters_off` or `mixed_adapters`.
    """
    state = state_of(model)
    state.leave_context()
    refuse_choosing(model, "set_adapter")
    if len(names) == 1 and isinstance(names[0], (list, tuple)):
        raise UserError(
            f"set_adapter: {names[0]!r} is a list: give the names one by one, as in "
            f"set_adapter(model, {', '.join(map(repr, names[0])) or repr(state.adapter)})."
        )
    for name in names:
        state.named(name)
    if not names or len({*names}) < len(names):
        raise UserError(
            f"set_adapter{names!r}: name one or several adapters, each once, of {', '.join(state.adapters)}; "
            "for the base model there is lora_lightning.adapters_off(model)."
        )
    if state.choice.at_home():
        hold(None, state.choice)
        activate(model, names)
    else:
        hold(Held(state.choice, partial(_own_view, weakref.ref(model), names)), state.choice)


def _own_view(model: weakref.ref[nn.Module], names: tuple[str, ...]) -> View:
    """The view of a thread that has selected these adapters for itself.

    Raises:
        UserError: one of them is gone.
    """
    found = model()
    assert found is not None  # its layers are called
    for name in names:
        state_of(found).named(name)
    view = view_as(found, names)
    show(view)
    return view


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter that is not selected. Layers that no other adapter updates are plain again.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        name: of the adapter.

    Raises:
        UserError: there is no such adapter, or it is selected; the model is not adapted, or merged.
    """
    refuse_merged(model)
    state = state_of(model)
    state.named(name)
    if name in state.active:
        others = [n for n in state.adapters if n not in state.active]
        remedy = (
            f"set_adapter(model, {others[0]!r}) first"
            if others
            else "eject(model), which gives the base model back"
        )
        raise UserError(f"adapter {name!r} is selected and cannot be deleted: call lora_lightning.{remedy}.")
    remove_adapter(model, name)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, in the order in which they were added.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).

    Raises:
        UserError: the model is not adapted.
    """
    return list(state_of(model).adapters)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of the selected adapters' updates (A, B and DoRA's magnitude), in the order of the
    layers.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
    """
    return [
        parameter
        for layer in lora_layers(model).values()
        for adapter in layer.lora_active
        for update in layer.updates(adapter)
        for parameter in update.trained()
    ]


def merge(model: nn.Module) -> None:
    """Add the active updates into the weights, so that inference costs what the base model's does.

    The sum is taken in float32 or better and rounded to the weight's dtype. Each base weight is kept
    beside it for `unmerge`. Merging a merged model changes nothing.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).

    Raises:
        UserError: the model is not adapted or sharded, or an update is not finite; no layer is merged.
    """
    refuse_sharded(model, "merge")
    refuse_replaced(model)
    layers = {n: layer for n, layer in _layers_of(model).items() if not layer.lora_merged}
    state_of(model).require_no_context()
    refuse_meta(model, "merge")
    begin_updates(model)
    merged: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        try:
            merged[name] = layer.merged_weights()
        except UserError as error:
            raise UserError(
                f"{name}: {error}. No layer was merged. Load an adapter of before the training diverged."
            ) from None
    with state_of(model).changing():
        written = {n: layer.merge_updates(merged[n]) for n, layer in layers.items()}
    hidden = [joined(n, w) for n, weights in written.items() for w in weights]
    if hidden:
        rank_zero_warn(
            f"{truncate_list(hidden)}: its parametrization (spectral norm, for example) has no values that "
            "give the "
            "merged weight: the model computes with it, but its state_dict() holds the base's. To save the "
            "merged weights call lora_lightning.eject(model, merged=True) instead."
        )


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is back, bit for bit. Does nothing when nothing is merged.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).

    Raises:
        UserError: the model is not adapted.
    """
    layers = [layer for layer in _layers_of(model).values() if layer.lora_merged]
    if layers:
        with state_of(model).changing():
            for layer in layers:
                layer.unmerge_updates()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context the model is the base model, bit for bit: no update is added, merged or not, and
    heads, norms and biases have the values of before training. What trains outside the backbone
    (`LoRAConfig.backbone`) belongs to no base and stays as the selected adapter has it.

    It holds for the calling thread and asyncio task alone, also within another such context.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).

    Raises:
        UserError: the model is not adapted or sharded.
    """
    refuse_sharded(model, "adapters_off")
    refuse_replaced(model)
    with opened(view_as(model, (), "adapters_off")):
        yield


def _layers_of(model: nn.Module) -> dict[str, LoRALayer]:
    layers = lora_layers(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no adapted layer: call lora_lightning.inject(model) first."
        )
    return layers
