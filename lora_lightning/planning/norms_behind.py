"""Which norm stands behind which convolution, and nothing else reads what is between them: by a trace of the
forward of the module that calls both, in which the modules that it calls are what they are."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lora_lightning.layers.norm import is_foldable
from lora_lightning.layers.swap import class_of
from lora_lightning.utils.names import named_modules, unwrapped


def norms_behind(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Names of convolutions -> names of the norms behind them; and names of modules -> why their forward,
    which calls norms, cannot be traced.

    Where a forward depends on what its inputs are it cannot be traced; it is taken not to depend on
    attributes that change later. A module that the model has by two names is in no pair.
    """
    modules = named_modules(model)
    names = {module: name for name, module in modules.items()}
    uses = Counter(named_modules(model, all_names=True).values())
    callers = {_caller(name, modules) for name, module in modules.items() if is_foldable(module)}
    pairs: dict[str, str] = {}
    failures: dict[str, str] = {}
    for caller in (name for name in modules if name in callers):
        try:
            called = _pairs_of(modules[caller])
        except Exception as error:  # whatever the forward of somebody else's module raises
            failures[caller] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            continue
        for conv, norm in called:
            if uses[conv] == uses[norm] == 1 and _fit(conv, norm):
                pairs[names[conv]] = names[norm]
    return pairs, failures


def _caller(name: str, modules: dict[str, nn.Module]) -> str:
    """The nearest module around that has a forward: a ModuleList has none."""
    name = name.rpartition(".")[0]
    while name and class_of(modules[name]).forward is nn.Module.forward:
        name = name.rpartition(".")[0]
    return name


def _fit(conv: nn.Module, norm: Any) -> bool:
    if not isinstance(conv, _ConvNd) or isinstance(conv, _ConvTransposeNd) or not is_foldable(norm):
        return False
    return conv.out_channels == len(norm.running_mean)


def _pairs_of(caller: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Modules that the forward calls once each, the second with nothing but the first's output, which goes
    nowhere else."""
    calls = [node for node in _traced(caller).nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    pairs = []
    for node in calls:
        first = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if isinstance(first, fx.Node) and first.op == "call_module" and len(first.users) == 1:
            targets = str(first.target), str(node.target)
            if times[targets[0]] == times[targets[1]] == 1:
                one, other = (unwrapped(caller.get_submodule(target)) for target in targets)
                pairs.append((one, other))
    return pairs


def _traced(caller: nn.Module) -> fx.Graph:
    """The graph of the forward in train mode. Nothing is left of the call: attributes that it sets are put
    back, and random numbers that it draws are drawn again.

    Raises:
        Exception: of any kind; it cannot be traced, or hands its inputs on by attributes.
    """
    if "forward" in caller.__dict__:
        raise ValueError("it has a forward of its own beside its class's")
    before, state = dict(caller.__dict__), random.getstate()
    caller.training = True
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            graph = _Tracer().trace(caller)
        if any(
            value is not before.get(name) for name, value in caller.__dict__.items() if name != "training"
        ):
            raise ValueError("its forward sets attributes")
        return graph
    finally:
        random.setstate(state)
        caller.__dict__.clear()
        caller.__dict__.update(before)


class _Tracer(fx.Tracer):
    """Takes every module for a whole. While it traces, fx gets the calls of other threads too, which pass
    through."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
