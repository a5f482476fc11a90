"""Different adapters for different rows of one batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.inject import refuse_merged
from lora_lightning.layers import own_modules
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.rows import Rows, serving, split_call
from lora_lightning.layers.rows_branch import RowsBranch, has_rows_branch
from lora_lightning.layers.swap import Swapped, swap_in, swap_out
from lora_lightning.record import Injection, injection_of, own_tensors, value_for


@contextmanager
def adapters_for(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Within this context each row of a batch has its own adapter; None is the base model.

    The outputs are those of running each row by itself with its adapter selected. Linear layers,
    convolutions and embeddings take two batched products, whatever the number of adapters; layers whose
    weight is read as a whole (nn.MultiheadAttention, RNNs, classes with a forward of their own) and heads,
    norms and biases of the adapters' own are called once for each adapter of the batch.

    The rows are the first dimension of each layer's input, or that holds a multiple of them with each
    row's together (windows, flattened tokens); in a model with sequence-first attention or RNNs, that one
    of the first two dimensions which is their number. Gradients reach the updates of selected adapters;
    of the heads they reach that of the first selected. With gradient checkpointing call `backward` within
    the context, since it calls the layers again.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        rows: an adapter's name, or None, for each row of the batch.

    Raises:
        UserError: an unknown name; the model is not adapted, or merged. In the context: a layer's input
            in which the rows cannot be told, or an adapted layer whose weight is read without a call.

    Example::

        with ll.adapters_for(model, ["scottish", "indian", None]):
            y = model(x)  # x: (3, ...)
    """
    refuse_merged(model)
    injection = injection_of(model)
    if isinstance(rows, str) or not rows:
        raise UserError(f"adapters_for: rows={rows!r}: give a list with one adapter's name, or None, a row.")
    for name in dict.fromkeys(rows):
        if name is not None:
            injection.named(name)
    modules = dict(own_modules(model))
    mixture = _Mixture(Rows(rows, _sequence_first(modules)), modules, model, injection)
    fused = torch.backends.mha.get_fastpath_enabled()
    injection.within = "adapters_for"
    try:
        mixture.install()
        torch.backends.mha.set_fastpath_enabled(fused and len(mixture.rows.distinct) == 1)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        mixture.remove()
        injection.within = ""


class Guarded(Swapped):
    """Mixin for a plain module with values of the adapters' own: they are read in its own calls alone."""

    prefix = "Guarded"
    lora_rows: Rows

    def read(self, name: str) -> Any:
        self.lora_rows.refuse_reading(self)
        return {**self._buffers, **self._parameters}[name]


@dataclass
class _Unit:
    """A module whose calls are taken over.

    Attributes:
        own: by leaf name the value for each adapter of the rows, where they differ.
        parts: the units that this one's call reads, itself among them.
    """

    name: str
    module: nn.Module
    own: dict[str, list[Tensor]] = field(default_factory=dict)
    parts: list[_Unit] = field(default_factory=list)


class _Mixture:
    """What `adapters_for` does to a model, and undoes."""

    def __init__(
        self, rows: Rows, modules: dict[str, nn.Module], model: nn.Module, injection: Injection
    ) -> None:
        self.rows, self.modules = rows, modules
        self.layers = [m for m in modules.values() if isinstance(m, LoRALayer)]
        self.active = [layer.lora_active for layer in self.layers]
        self.own = _own_values(model, injection, rows)
        self.undo: list[Callable[[], None]] = []

    def install(self) -> None:
        rows, mixed = self.rows, set()
        uniform = len(rows.distinct) == 1
        for layer in self.layers:
            adapters = [n for n in rows.distinct if n is not None and n in layer.lora]
            layer.lora_active = tuple(adapters) if uniform else ()
            if adapters and not uniform:
                mixed.add(layer)
        units = {}
        for path, values in self.own.items():
            differing = {leaf: v for leaf, v in values.items() if any(t is not v[0] for t in v)}
            same = {leaf: v[0] for leaf, v in values.items() if leaf not in differing}
            self.undo.append(_put(self.modules[path], same))
            _refresh(self.modules[path])
            if differing:
                units[path] = _Unit(path, self.modules[path], differing)
        for path, module in self.modules.items():
            if module in mixed:
                units.setdefault(path, _Unit(path, module))
        for path in list(units):
            parent = path.rpartition(".")[0]
            if path and isinstance(self.modules.get(parent), nn.MultiheadAttention):
                units.setdefault(parent, _Unit(parent, self.modules[parent]))
        for unit in units.values():
            rows.called[id(unit.module)] = unit.name
            updates = 1 if isinstance(unit.module, LoRALayer) else 0
            holds = len(unit.module._modules) > updates
            below = f"{unit.name}." if unit.name else ""
            inside = (u for u in units.values() if u is not unit and u.name.startswith(below))
            unit.parts = [unit, *(inside if holds else ())]
        for unit in units.values():
            self._take_over(unit)

    def remove(self) -> None:
        for undo in reversed(self.undo):
            undo()
        for path in self.own:
            _refresh(self.modules[path])
        for layer, active in zip(self.layers, self.active, strict=True):
            layer.lora_active = active

    def _take_over(self, unit: _Unit) -> None:
        module, rows = unit.module, self.rows
        before = {n: v for n, v in module.__dict__.items() if n == "forward"}
        guarded = bool(unit.own) and not isinstance(module, LoRALayer)
        if guarded:
            swap_in(module, Guarded, tuple(sorted(unit.own)))

        def give_back() -> None:
            for name in ("forward", "lora_rows"):
                module.__dict__.pop(name, None)
            module.__dict__.update(before)
            if guarded:
                swap_out(module)

        self.undo.append(give_back)
        module.lora_rows = rows  # type: ignore[assignment]
        original = module.forward
        if isinstance(module, LoRALayer) and has_rows_branch(module) and set(unit.own) <= {"bias"}:
            mixed: Callable[..., Any] = RowsBranch(module, rows, unit.own.get("bias"))
        else:

            def mixed(*args: Any, **kwargs: Any) -> Any:
                return split_call(rows, module, original, lambda j: _serve(rows, unit, j), args, kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            # within another module's call the rows are one adapter's already
            return mixed(*args, **kwargs) if rows.serving is None else original(*args, **kwargs)

        module.forward = _not_compiled(forward)


def _not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called as it is by compiled models too: each new list of rows would compile anew."""
    if "torch._dynamo" not in sys.modules:  # no model is compiled yet, and its import takes seconds
        return function
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


@contextmanager
def _serve(rows: Rows, unit: _Unit, j: int) -> Iterator[None]:
    """Within this context the unit's module is that of the j-th adapter of the rows."""
    undo = [_put(part.module, {leaf: values[j] for leaf, values in part.own.items()}) for part in unit.parts]
    with serving(rows, j):
        for part in unit.parts:
            _refresh(part.module)
        try:
            yield
        finally:
            for put_back in undo:
                put_back()
            for part in unit.parts:
                _refresh(part.module)


def _put(module: nn.Module, values: dict[str, Tensor]) -> Callable[[], None]:
    """Put tensors in the places of a module's own parameters and buffers; gives what undoes it. The
    tensors themselves are exchanged, not their contents: a backward may come later."""
    places = {n: module._parameters if n in module._parameters else module._buffers for n in values}
    before = {n: places[n][n] for n in values}
    for name, value in values.items():
        places[name][name] = value  # type: ignore[assignment]

    def put_back() -> None:
        for name, value in before.items():
            places[name][name] = value  # type: ignore[assignment]

    return put_back


def _refresh(module: nn.Module) -> None:
    """A recurrent module keeps a list of its weights."""
    if isinstance(module, nn.RNNBase) and not isinstance(module, LoRALayer):
        module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]


def _own_values(model: nn.Module, injection: Injection, rows: Rows) -> dict[str, dict[str, list[Tensor]]]:
    """By module and leaf name, the value for each adapter of the rows of every tensor that one of them,
    or the adapter whose values stand in the model, trains."""
    involved = [n for n in dict.fromkeys([injection.adapter, *rows.distinct]) if n is not None]
    own = own_tensors(model, dict.fromkeys(n for name in involved for n in injection.adapters[name].own))
    found: dict[str, dict[str, list[Tensor]]] = {}
    for name, tensor in own.items():
        values = [value_for(injection, adapter, name, tensor) for adapter in rows.distinct]
        path, _, leaf = name.rpartition(".")
        if any(value is not tensor for value in values):
            found.setdefault(path, {})[leaf] = values
    return found


def _sequence_first(modules: dict[str, nn.Module]) -> str:
    """Name of the first module that takes (time, batch, features), or ""."""
    for name, module in modules.items():
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and not module.batch_first:
            return name or type(module).__name__
    return ""
