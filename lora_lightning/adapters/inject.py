"""From a plan to an adapted model: layers swapped in place, the rest frozen. `eject` goes the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.base_values import (
    begin_updates,
    follow_base,
    refuse_replaced,
)
from lora_lightning.adapters.by_data import begin_with, decide
from lora_lightning.adapters.fold import fold_norms
from lora_lightning.adapters.making import Made, made_updates, needs_values
from lora_lightning.adapters.measure import run
from lora_lightning.adapters.state import (
    Adapter,
    AdapterState,
    extra_tensors,
    put_adapter_values,
    put_base_values,
    state_of,
    viewed_as_plain,
)
from lora_lightning.config import BY_GRADIENTS, LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.kernels.sources import remember_norms
from lora_lightning.layers.layer import adapt, forget
from lora_lightning.layers.norm import FrozenNorm, freeze_statistics, has_statistics
from lora_lightning.layers.registry import base_modules, lora_layers
from lora_lightning.layers.swap import swap_out
from lora_lightning.planning.peft_config import config_of
from lora_lightning.planning.targets import Plan, head_alone, inside_backbone, plan, plan_parts, trained_names
from lora_lightning.utils.marks import Check
from lora_lightning.utils.names import (
    inside,
    named_modules,
    named_parameters,
    own_buffers,
    submodule,
    unwrapped,
)
from lora_lightning.utils.sharding import FIRST, refuse_sharded


def inject(
    model: nn.Module,
    config: LoRAConfig | None = None,
    adapter: str = "default",
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Plan:
    """Adapt `model` in place: give the planned layers low-rank updates and freeze the rest.

    The outputs do not change, but by `init="lora_one"`, which takes a first step. The model's objects, the
    names in its `state_dict()` and its hooks stay; the new parameters are `<layer>.lora.<adapter>.lora_A` and
    `lora_B`.

    Args:
        model: any module that is not adapted yet.
        config: None takes the defaults; a mapping of LoRAConfig's fields and PEFT's `LoraConfig` will do.
        adapter: name of the updates, an identifier.
        data: batches, on the model's device, for ranks and inits that are decided by data; as many of them
            are seen as `config.data_batches` says.
        loss: of the model and a batch, for inits by gradients. Without it the model is called with each
            batch: a tensor, a tuple of arguments or a dictionary of keyword arguments.

    Returns:
        The plan that was carried out; `print` it for a table.

    Raises:
        ConfigError: as `plan`, or the configuration needs data or a loss, and there are none; the model is
            untouched.
        UserError: the model is sharded, or the data do not show what is asked for.
    """
    refuse_sharded(model, "inject", FIRST)
    config = config_of(config)
    if not config.by_data:
        planned = plan(model, config)
        apply_plan(model, config, planned, adapter)
        return planned
    if data is None or (loss is None and config.init in BY_GRADIENTS):
        raise ConfigError([needs_data(config)])
    check_adapter(model, config, adapter)
    step = partial(run if loss is None else loss, model)
    decision = decide(model, config, islice(data, config.data_batches), step)
    apply_plan(model, config, decision.plan, adapter)
    begin_with(model, decision, adapter)
    return decision.plan


def needs_data(config: LoRAConfig) -> str:
    """What to give where a configuration is decided by data."""
    loss = ", loss=FUNCTION" if config.init in BY_GRADIENTS else ""
    of = " of the model and a batch" if loss else ""
    return (
        f"{config.by_data}: decided by data: give inject(model, config, data=BATCHES{loss}){of}, or use "
        "LoRACallback in a fit, which takes them from the training data."
    )


def apply_plan(
    model: nn.Module, config: LoRAConfig, planned: Plan, adapter: str = "default", begins: bool = True
) -> None:
    """`inject` by a plan that is known already, for example from a file.

    Args:
        begins: false where the updates are loaded next, and no init is to be made of the weights.

    Raises:
        ConfigError: the adapter's name is no identifier; the model is untouched.
        UserError: a weight of which an init is to be made is not finite; the model is untouched.
    """
    check_adapter(model, config, adapter)
    made = made_updates(model, config, planned, begins)
    parameters = named_parameters(model)
    state = AdapterState(requires_grad={n: p.requires_grad for n, p in parameters.items()})
    names = extra_names(model, config, planned)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    unwrapped(model).__dict__["lora_state"] = state
    _attach(model, config, planned, adapter, names, made)
    activate(model, (adapter,))


def attach_adapter(
    model: nn.Module, config: LoRAConfig, planned: Plan, adapter: str, begins: bool = True
) -> None:
    """Give an adapted model one more adapter by a plan that is known already; it is not selected.

    Args:
        begins: as of `apply_plan`.

    Raises:
        ConfigError: the adapter's name is no identifier; the model is untouched.
        UserError: as `apply_plan`.
    """
    check_adapter(model, config, adapter)
    with state_of(model).changing():
        put_base_values(model)
        try:
            with viewed_as_plain(model):
                names = extra_names(model, config, planned)
                made = made_updates(model, config, planned, begins)
            _attach(model, config, planned, adapter, names, made)
        finally:
            put_adapter_values(model)


def check_adapter(model: nn.Module, config: LoRAConfig, adapter: str) -> None:
    """Refuse what no model can have.

    Raises:
        ConfigError: the adapter's name is no identifier, DoRA or an init that needs the weights on the meta
            device, or DDP around a module.
    """
    check_name(adapter)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ConfigError([
            "the model is in DistributedDataParallel, which has noted already what trains: inject into the "
            "module first, and then wrap it."
        ])  # fmt: skip
    if any(p.is_meta for p in model.parameters()) and (problems := needs_values(config)):
        raise ConfigError(problems)


ADAPTER_NAME = Check(
    "an identifier that is no method of nn.Module, such as 'scottish'",
    lambda v: isinstance(v, str) and v.isidentifier() and not hasattr(nn.ModuleDict, v),
)


def name_problem(adapter: object) -> str | None:
    """Why this cannot be an adapter's name, or None when it can."""
    return next(iter(ADAPTER_NAME.problems("adapter", adapter)), None)


def check_name(adapter: object) -> None:
    """Refuse what cannot be an adapter's name.

    Raises:
        ConfigError: it is no identifier.
    """
    if problem := name_problem(adapter):
        raise ConfigError([problem])


def extra_names(model: nn.Module, config: LoRAConfig, planned: Plan) -> tuple[str, ...]:
    """Names of the plain model's own tensors that such an adapter trains, in their order."""
    trained = trained_names(
        model, config, planned.backbone, planned.heads, [p.module for p in planned.layers]
    )
    moving: list[str] = []
    for name, module in named_modules(model).items():
        moves = inside(name, planned.heads) or config.train_norm in ("stats", "both")
        if moves and has_statistics(module) and inside_backbone(name, planned.backbone):
            moving += own_buffers(name, module)
    return (*[n for n in named_parameters(model) if n in trained], *moving)


def activate(model: nn.Module, names: tuple[str, ...]) -> None:
    """Select these adapters: their updates are added and train, the values of the first stand in the
    model and train, norm layers are frozen as it says, and nothing of the others trains."""
    state = state_of(model)
    with state.choice.lock:
        _deactivate(model, state)
        state.active = names
        put_adapter_values(model)
        for layer in lora_layers(model).values():
            layer.select(tuple(n for n in names if n in layer.lora))
            for adapter in layer.lora_active:
                for update in layer.updates(adapter):
                    update.requires_grad_(True)
        _flag_own(model, state, True)
        _freeze_statistics(model, state)
        fold_norms(model, state)
        begin_updates(model)
        state.choice.version += 1


def remove_adapter(model: nn.Module, adapter: str) -> None:
    """Take an adapter that is not selected out of the model."""
    with state_of(model).changing():
        for layer in lora_layers(model).values():
            if adapter in layer.lora:
                forget(layer, adapter)
        del state_of(model).adapters[adapter]
        follow_base(model)


def replace(model: nn.Module, config: LoRAConfig, planned: Plan, adapter: str, begins: bool = True) -> None:
    """Put an adapter by another plan in the place of one, selected or not as that was."""
    state = state_of(model)
    active = state.active
    _deactivate(model, state)
    remove_adapter(model, adapter)
    attach_adapter(model, config, planned, adapter, begins)
    activate(model, active)


def refuse_merged(model: nn.Module) -> None:
    """Refuse to change the adapters of a model whose weights hold the selected ones' sum.

    Raises:
        UserError: the model is merged, sharded, or some thread or task is within a context of it; or a
            module of its plan was replaced.
    """
    state_of(model).require_no_context()
    refuse_choosing(model, "changing adapters")


def refuse_choosing(model: nn.Module, action: str) -> None:
    """Refuse to choose among the adapters of a model whose weights hold the selected ones' sum.

    Raises:
        UserError: the model is merged or sharded, or a module of its plan was replaced.
    """
    refuse_sharded(model, action)
    refuse_replaced(model)
    if any(layer.lora_merged for layer in lora_layers(model).values()):
        raise UserError("the adapters are merged into the weights: call lora_lightning.unmerge(model) first.")


def linear_probe(model: nn.Module, config: LoRAConfig | None = None) -> Plan:
    """Freeze the backbone and train the head alone: the linear probe. `eject` undoes it.

    Args:
        model: any module that is not adapted yet.
        config: of its fields, `modules_to_save`, which names the head, and `backbone` count.

    Raises:
        ConfigError: no head is found.
    """
    return train_parts(model, head_alone(config_of(config)))


def train_parts(model: nn.Module, config: LoRAConfig) -> Plan:
    """Freeze the backbone but for parts of its own: the head, and biases and normalization layers as
    `train_bias` and `train_norm` say; nothing is added. `eject` undoes it.

    Raises:
        ConfigError: nothing would train.
    """
    planned = plan_parts(model, config)
    apply_plan(model, config, planned)
    return planned


def freeze_norms(model: nn.Module) -> None:
    """Put frozen norm layers back into eval mode where another tool has replaced them (SyncBatchNorm)."""
    state = state_of(model)
    for name in state.training:
        freeze_statistics(submodule(model, name), state.config.implementation)
    fold_norms(model, state)


def _attach(
    model: nn.Module, config: LoRAConfig, planned: Plan, adapter: str, names: tuple[str, ...], made: Made
) -> None:
    """Give the model the adapter's updates and its copies of the model's own tensors; nothing is selected."""
    state = state_of(model)
    remember_norms(model)
    for name, (family, slots) in made.items():
        adapt(submodule(model, name), family, slots, adapter, state.choice, name)
    own = extra_tensors(model, names)
    values = {n: t.detach().clone() for n, t in own.items()} if state.adapters else {}
    for name, tensor in own.items():
        if inside_backbone(name, planned.backbone) and name not in state.originals:
            state.originals[name] = tensor.detach().clone()
    state.adapters[adapter] = Adapter(config, planned, names, values)
    follow_base(model)


def _deactivate(model: nn.Module, state: AdapterState) -> None:
    """Select nothing: the model computes what the base does, and nothing of the adapters trains."""
    put_base_values(model)
    _flag_own(model, state, False)
    for layer in lora_layers(model).values():
        for adapter in layer.lora_active:
            layer.lora[adapter].requires_grad_(False)
        layer.select(())
    state.active = ()


def _flag_own(model: nn.Module, state: AdapterState, trains: bool) -> None:
    """Whether the parameters of the model's own that the first selected adapter trains do so."""
    for adapter in (state.adapters[n] for n in state.active[:1]):
        for tensor in extra_tensors(model, adapter.extra_trainables).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(trains)


def _freeze_statistics(model: nn.Module, state: AdapterState) -> None:
    """Freeze the running statistics that the first selected adapter does not move, let go the others."""
    own = set(state.adapters[state.adapter].extra_trainables)
    for name, module in base_modules(model):
        if not has_statistics(module) or not inside_backbone(name, state.plan.backbone):
            continue
        moves = any(n in own for n in own_buffers(name, module))
        if not moves:
            state.training.setdefault(name, module.training)
            freeze_statistics(module, state.config.implementation)
        elif isinstance(module, FrozenNorm):
            swap_out(module)
            module.train(model.training)
            state.training.pop(name, None)
