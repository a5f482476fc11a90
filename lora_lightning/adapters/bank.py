"""Bank: the view of a model in which each sample of a batch has its parked adapter, whatever their number.

A batch stacks the rows of its adapters (`adapters.rows`), which the adapters own, and each module takes its
numbers from the stack as views. What asks which modules these are is made once for adapters of some plans. A
module that has no batched forward is called once for each adapter, which for that has to be in the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.mixed_attention import MixedAttention, can_mix
from lora_lightning.adapters.mixed_batch import sequence_first
from lora_lightning.adapters.mixed_branch import has_mixed_branch
from lora_lightning.adapters.mixed_rows import (
    FORWARDS,
    NOTHING,
    Batch,
    OwnValues,
    RowBranch,
    forward_of,
    own_names,
)
from lora_lightning.adapters.mixed_samples import MixedSamples, refuse_boxes, taking_boxes
from lora_lightning.adapters.mixed_split import split_call
from lora_lightning.adapters.parking import Parked
from lora_lightning.adapters.rows import Layout
from lora_lightning.adapters.state import every_name, extra_tensors, state_of, value_for
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.registry import base_modules
from lora_lightning.layers.viewed import own_forward
from lora_lightning.layers.views import View, opened, seen
from lora_lightning.utils.names import joined

ROADS = 8  # sets of plans for which is kept what a batch needs


class Bank:
    """Views of one model for batches. For one thread at a time, which alone has the model.

    Args:
        model: with nothing selected but what changes nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._roads: OrderedDict[tuple[Layout, ...], Road] = OrderedDict()

    def road(self, adapters: Sequence[Parked | None]) -> Road:
        """What opens views for adapters of these plans; at least one is not the base."""
        layouts = tuple(sorted({a.layout for a in adapters if a is not None}, key=id))
        if layouts not in self._roads:
            self._roads[layouts] = Road(self.model, layouts)
        self._roads.move_to_end(layouts)
        if len(self._roads) > ROADS:
            self._roads.popitem(last=False)
        return self._roads[layouts]


class Road:
    """Opens views of a model for batches of adapters of some plans, one at a time.

    Attributes:
        splits: whether modules are called once for each adapter.
    """

    def __init__(self, model: nn.Module, layouts: Sequence[Layout]) -> None:
        state = state_of(model)
        self.choice, self.layouts, self.modules = state.choice, layouts, dict(base_modules(model))
        own = extra_tensors(model, dict.fromkeys(n for layout in layouts for n in layout.values))
        self.base = {name: value_for(state, None, name, tensor) for name, tensor in own.items()}
        self._base_rows = {layout: layout.filled(dict(self.base.items()))[0] for layout in layouts}
        aliases = every_name(self.modules, {id(tensor) for tensor in own.values()})
        self.names = {alias: name for name, tensor in own.items() for alias in aliases[id(tensor)]}
        self._first = sequence_first(self.modules)
        self._paths = {id(module): path for path, module in self.modules.items()}
        self._calls = {path: self._call(path, self.modules[path]) for path in self._called()}
        self.splits = any(isinstance(call, partial) for call in self._calls.values())
        self._taking_boxes = taking_boxes(self.modules, self._calls)
        self._batch = NOTHING

    @contextmanager
    def opened(self, adapters: Sequence[Parked | None]) -> Iterator[None]:
        """Within this context the calling thread gives each sample of a batch its adapter, None the base.
        Those of a batch of one adapter alone have to be in the model, and where a module `splits` all.

        Raises:
            UserError: there are several, and a module takes boxes, of which it cannot be told whose they are.
        """
        alone = len({*adapters}) == 1
        view = self._alone(adapters[0], "mixed_adapters", self.modules) if alone else self._mixed(adapters)
        try:
            with opened(view):
                yield
        finally:
            self._begin(NOTHING)  # an adapter that leaves is not held until the next batch

    def _mixed(self, adapters: Sequence[Parked | None]) -> View:
        refuse_boxes(self._taking_boxes)
        names = [None if a is None else a.name for a in adapters]
        samples = MixedSamples(names, self._first, self.modules.values())
        samples.called = self._paths
        rows = {layout: self._rows(layout, adapters) for layout in self.layouts}
        self._begin(Batch(samples, [*dict.fromkeys(adapters)], rows, self.base))
        values = dict.fromkeys(self.names)  # None: they cannot be read as one
        return View(self.choice, "mixed_adapters", (), values, samples, self._calls, self.modules)

    def _begin(self, batch: Batch) -> None:
        self._batch = batch
        for call in self._calls.values():
            if not isinstance(call, partial):
                call.begin(batch)

    def _rows(self, layout: Layout, adapters: Sequence[Parked | None]) -> Tensor:
        base = self._base_rows[layout]
        return torch.stack([base if a is None or a.layout is not layout else a.row for a in adapters])

    def _alone(self, adapter: Parked | None, within: str, modules: dict[str, nn.Module]) -> View:
        """The model with one adapter, which has to be in it."""
        if adapter is None:
            return View(self.choice, within, modules=modules)
        own = adapter.record.values
        values = {alias: own[name] for alias, name in self.names.items() if name in own}
        return View(self.choice, within, (adapter.name,), values, modules=modules)

    def _called(self) -> list[str]:
        """The modules that the adapters change, and attention that reads such a module's weight."""
        layers = [self._paths[id(layer)] for layout in self.layouts for layer in layout.updates]
        paths = dict.fromkeys([*layers, *(alias.rpartition(".")[0] for alias in self.names)])
        parents = [path.rpartition(".")[0] for path in paths if path]
        attention = [p for p in parents if isinstance(self.modules.get(p), nn.MultiheadAttention)]
        return [*dict.fromkeys([*paths, *attention])]

    def _call(self, path: str, module: nn.Module) -> Any:
        own = own_names(self.names, path, module)
        if not own and can_mix(module, self.layouts) and not self._owned(joined(path, "out_proj")):
            return MixedAttention(cast(nn.MultiheadAttention, module), path, self.layouts)
        if isinstance(module, LoRALayer):
            if has_mixed_branch(module) and own.keys() <= {"bias"}:
                return RowBranch(module, path, self.layouts, own.get("bias", ""))
        elif own.keys() <= {"weight", "bias"} & module._parameters.keys() and forward_of(module) in FORWARDS:
            return OwnValues(module, own)
        return partial(self._split, module)

    def _owned(self, path: str) -> bool:
        """Whether adapters have own values of the module's tensors."""
        return bool(own_names(self.names, path, self.modules[path]))

    def _split(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        views = [self._alone(adapter, "", {}) for adapter in self._batch.adapters]
        return split_call(
            self._batch.samples, module, own_forward(module), lambda j: seen(views[j]), args, kwargs
        )
