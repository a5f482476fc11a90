"""What was done to a model, kept on it as `model.lora_state`, and the way to read it as it was before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.layers.layer import slot_key
from lora_lightning.layers.registry import LoRALayer, base_modules
from lora_lightning.layers.swap import ClassSwap, class_of, give_class, plain_class
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.layers.viewed import KEPT
from lora_lightning.layers.views import Choice, Standing, View, holds, within
from lora_lightning.planning.plan import LayerPlan, Plan
from lora_lightning.utils.names import joined, named_parameters, submodule, unwrapped

# An entry of a checkpoint's state_dict: a module without LoRA names it as unexpected when it refuses.
ADVICE = "lora_lightning: an adapter without its base; use LoRACallback or ll.load_from_checkpoint"


@dataclass
class Adapter:
    """One adapter: what was asked for, what was decided, and what it trains of the model's own.

    Attributes:
        extra_trainables: names of the model's own tensors that it trains: parameters of heads, norms and
            biases, what trains outside the backbone, and running statistics that move.
        values: those tensors' values, while they do not stand in the model.
    """

    config: LoRAConfig
    plan: Plan
    extra_trainables: tuple[str, ...] = ()
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class AdapterState:
    """The record on an adapted model.

    Attributes:
        adapters: by name, in the order in which they were added.
        active: the selected adapters. The own values of the first of them stand in the model.
        originals: values before training of the model's own tensors inside the backbone that some
            adapter trains, by name.
        requires_grad: the flag of every parameter before.
        training: the mode before of every norm layer that is frozen now.
        norms_behind: names of convolutions -> of the norms behind them, once that was asked for.
        begun: whether the model's own tensors may have trained values, since when only what
            `load_state_dict` brings is taken for the base's.
        restoring: whether the next state that is loaded is a checkpoint's of this model.
        choice: who sees the model otherwise than it stands.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    training: dict[str, bool] = field(default_factory=dict)
    norms_behind: dict[str, str] | None = None
    begun: bool = False
    restoring: bool = False
    choice: Choice = field(default_factory=Choice)

    @property
    def adapter(self) -> str:
        """Name of the first selected adapter."""
        return self.active[0]

    @property
    def config(self) -> LoRAConfig:
        """Of the first selected adapter."""
        return self.adapters[self.adapter].config

    @property
    def plan(self) -> Plan:
        """Of the first selected adapter."""
        return self.adapters[self.adapter].plan

    def named(self, name: str) -> Adapter:
        """The adapter of this name.

        Raises:
            UserError: there is none.
        """
        if not isinstance(name, str) or name not in self.adapters:
            near = did_you_mean(name, self.adapters) if isinstance(name, str) else " A name is a text."
            raise UserError(f"there is no adapter {name!r}.{near} Give one of {', '.join(self.adapters)}.")
        return self.adapters[name]

    def leave_context(self) -> None:
        """Refuse to choose adapters where a context manager has chosen.

        Raises:
            UserError: the calling thread or task is within one.
        """
        if name := within(self.choice):
            raise UserError(f"the model is within {name}(model): leave that context first.")

    def require_no_context(self) -> None:
        """Refuse to change the model for everybody while somebody sees it otherwise for a while.

        Raises:
            UserError: some thread or task is within a context manager of the model, or the calling one has
                selected adapters for itself alone.
        """
        self.leave_context()
        if self.choice.contexts:
            raise UserError(
                f"another thread or task is within {self.choice.contexts[0]}(model), and this changes the "
                "model for all: wait until it has left that context."
            )
        if holds(self.choice):
            raise UserError(
                "this thread or task has selected adapters for itself alone, and this changes the model for "
                "all: do it in the thread in which the model was adapted."
            )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within this context the model changes for everybody.

        Raises:
            UserError: as `require_no_context`.
        """
        with self.choice.lock:
            self.require_no_context()
            yield
            self.choice.version += 1


def state_of(model: nn.Module) -> AdapterState:
    """The record that `inject` left on the model.

    Raises:
        UserError: there is none.
    """
    state = unwrapped(model).__dict__.get("lora_state")
    if not isinstance(state, AdapterState):
        raise UserError(
            f"{type(model).__name__} is not an adapted model: call lora_lightning.inject(model) first, "
            "or pass the very module that was given to it (with LoRACallback, the LightningModule)."
        )
    return state


def is_injected(model: nn.Module) -> bool:
    """Whether `inject` or `linear_probe` was called on this very module."""
    return isinstance(unwrapped(model).__dict__.get("lora_state"), AdapterState)


def extra_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The model's parameters and buffers of these names; those that are gone are left out."""
    found: dict[str, Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        try:
            module = submodule(model, path)
        except AttributeError:
            continue
        tensor = {**module._buffers, **module._parameters}.get(leaf)
        if tensor is not None:
            found[name] = tensor
    return found


def update_of(model: nn.Module, planned: LayerPlan, adapter: str) -> LowRankUpdate:
    """An adapter's update of a planned layer in the model."""
    layer = cast(LoRALayer, submodule(model, planned.module))
    return cast(LowRankUpdate, cast(nn.ModuleDict, layer.lora[adapter])[slot_key(planned.slot)])


def value_for(state: AdapterState, adapter: str | None, name: str, tensor: Tensor) -> Tensor:
    """The value of the model's own tensor when this adapter is selected; None is the base. What trains
    outside the backbone has no base value and is then as it stands.

    Args:
        tensor: the one of this name that stands in the model.
    """
    record = state.adapters[adapter] if adapter is not None else None
    if record is not None and name in record.extra_trainables:
        values = record.values if adapter != state.adapter else {}
    else:
        values = state.originals
    if name not in values:
        return tensor
    values[name] = values[name].to(tensor.device, tensor.dtype)  # as the model was moved since
    return values[name]


@torch.no_grad()
def put_base_values(model: nn.Module) -> None:
    """Take the values of the first selected adapter out of the model into its record; inside the
    backbone those of before training take their place."""
    state = state_of(model)
    for adapter in (state.adapters[n] for n in state.active[:1]):
        for name, tensor in extra_tensors(model, adapter.extra_trainables).items():
            adapter.values[name] = tensor.data
            if name in state.originals:
                tensor.data = state.originals[name].to(tensor.device, tensor.dtype)
    forget_kept(model)


@torch.no_grad()
def put_adapter_values(model: nn.Module) -> None:
    """Put the values of the first selected adapter into the model."""
    state = state_of(model)
    for adapter in (state.adapters[n] for n in state.active[:1]):
        for name, tensor in extra_tensors(model, adapter.extra_trainables).items():
            if name in adapter.values:
                tensor.data = adapter.values.pop(name).to(tensor.device, tensor.dtype)
    forget_kept(model)


def forget_kept(model: nn.Module) -> None:
    """Let attention compute anew what it keeps of its biases, which now have other values."""
    for module in model.modules():
        if vars(module).get(KEPT):
            setattr(module, KEPT, {})


def view_as(model: nn.Module, active: tuple[str, ...], context: str = "") -> View:
    """The model as it is with these adapters selected, the first of which says the values of heads, norms and
    biases; none of them is the base.

    Args:
        context: name of the context manager that it is for.
    """
    return views_as(model, [active], context)[0]


def views_as(model: nn.Module, choices: Iterable[tuple[str, ...]], context: str = "") -> list[View]:
    """`view_as` for each of several choices."""
    state = state_of(model)
    adapters, modules = state.adapters.values(), dict(base_modules(model))
    own = extra_tensors(model, dict.fromkeys(n for adapter in adapters for n in adapter.extra_trainables))
    names = every_name(modules, {id(tensor) for tensor in own.values()}) if own else {}
    views = []
    with state.choice.lock:
        for active in choices:
            values: dict[str, Tensor | Standing | None] = {}
            for name, tensor in own.items():
                value = value_for(state, active[0] if active else None, name, tensor)
                if value is not tensor:
                    values.update(dict.fromkeys(names[id(tensor)], value))
                elif len(adapters) > 1:  # another choice of adapters would take it out of the model
                    values.update(dict.fromkeys(names[id(tensor)], Standing(tensor, tensor.data)))
            views.append(View(state.choice, context, active, values, modules=modules))
    return views


def every_name(modules: Mapping[str, nn.Module], tensors: set[int]) -> dict[int, list[str]]:
    """The names of tensors of the model's, given by identity: a tied one has several."""
    names: dict[int, list[str]] = {}
    for path, module in modules.items():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in tensors:
                names.setdefault(id(tensor), []).append(joined(path, leaf))
    return names


@contextmanager
def viewed_as_plain(model: nn.Module) -> Iterator[None]:
    """Within this context the model looks as it did before it was adapted: the classes of its modules,
    its names and flags, but not its values. So a plan for one more adapter is the plan for a plain model."""
    if not is_injected(model):
        yield
        return
    swapped = [m for _, m in base_modules(model) if isinstance(m, ClassSwap)]
    kept = [(module, class_of(module), dict(module._modules)) for module in swapped]
    for module in swapped:
        if isinstance(module, LoRALayer):
            del module._modules["lora"]
        give_class(module, plain_class(module))
    before = state_of(model).requires_grad
    flags = {n: p.requires_grad for n, p in named_parameters(model).items()}
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))
    try:
        yield
    finally:
        for name, parameter in named_parameters(model).items():
            parameter.requires_grad_(flags[name])
        for module, swapped_class, children in kept:
            give_class(module, swapped_class)
            module._modules.clear()
            module._modules.update(children)
