"""Modules of which each sample's adapter has its own numbers, taken from the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.mixed_branch import MixedBranch
from lora_lightning.adapters.mixed_samples import MixedSamples
from lora_lightning.adapters.parking import Parked
from lora_lightning.adapters.rows import Layout, is_plain
from lora_lightning.adapters.stacks import Stack, shaped
from lora_lightning.kernels.common import product_dtype
from lora_lightning.layers.embedding import LoRAEmbedding
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.linear import LoRALinear
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.layers.viewed import own_forward
from lora_lightning.utils.names import joined

FACTORS = ("lora_A", "lora_B")
Places = list[tuple[Layout, str]]  # of one slot of a layer: the layouts that have it, with its key there


@dataclass
class Batch:
    """The adapters of one batch.

    Attributes:
        adapters: of each of `samples.distinct`, None is the base.
        rows: by the layout, of each sample; those of the base for samples of another layout.
        base: values of the model's own tensors that adapters train, by name.
    """

    samples: MixedSamples
    adapters: Sequence[Parked | None]
    rows: Mapping[Layout, Tensor]
    base: Mapping[str, Tensor]

    def value(self, name: str) -> Tensor:
        """One of the model's own tensors for each sample, (n, *shape)."""
        layout = next(iter(self.rows))
        if len(self.rows) == 1 and name in layout:
            return layout.of(self.rows[layout], name)
        base = self.base[name]
        each = [base if a is None else a.record.values.get(name, base) for a in self.adapters]
        return self.samples.by_sample(each)


NOTHING = Batch(MixedSamples((None,), "", ()), [], {}, {})  # between two batches


class RowBranch(MixedBranch):
    """The forward of an adapted layer with a low-rank branch.

    Args:
        path: the layer's name in the model.
        layouts: of the adapters.
        bias: name of the bias where the adapters have their own, else "".
    """

    def __init__(self, layer: LoRALayer, path: str, layouts: Iterable[Layout], bias: str) -> None:
        biases = partial(self._value, bias) if bias else None
        super().__init__(layer, path, NOTHING.samples, {}, {}, biases)
        self.batch = NOTHING
        self.places: dict[Slot, Places] = {}
        for layout in layouts:
            for key, update in layout.updates.get(layer, {}).items():
                self.places.setdefault(update.slot, []).append((layout, key))

    def begin(self, batch: Batch) -> None:
        """From now on the layer computes for this batch."""
        self.batch, self.samples = batch, batch.samples
        self._ready: dict[bool, tuple[list[Stack], dict[Slot, list[LowRankUpdate | None]]]] = {}
        self._stacks, self._versions = [], None

    def _value(self, name: str) -> Tensor:
        return self.batch.value(name)

    def stacks(self, x: Tensor) -> list[Stack]:
        half = x.is_floating_point() and product_dtype(x) == torch.float16
        if half not in self._ready:  # there the factors are shared out, adapter by adapter
            in_rows = {} if half else {s: p for s, p in self.places.items() if self._in_rows(p)}
            stacks = [self._stack(s, *place) for s, places in in_rows.items() for place in places]
            others = {s: self._updates(p) for s, p in self.places.items() if s not in in_rows}
            self._ready[half] = stacks, others
        stacks, self.slots = self._ready[half]
        return [*stacks, *super().stacks(x)] if self.slots else stacks

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        if layer.mixin_class is not LoRALinear:
            return super()._base(x, *args, **kwargs)
        # the same without asking for a view: no adapter has a weight of its own here
        return F.linear(x, layer._weight("weight"), None if self.biases else layer._parameters["bias"])

    def _in_rows(self, places: Places) -> bool:
        """Whether A and B of the slot are all that its updates have, and stand in the rows."""
        updates = [layout.updates[self.layer][key] for layout, key in places]
        plain = all(is_plain(u) and u.lora_magnitude is None for u in updates)
        there = all((self.layer, key, leaf) in layout for layout, key in places for leaf in FACTORS)
        return plain and there and not isinstance(self.layer, LoRAEmbedding)

    def _stack(self, slot: Slot, layout: Layout, key: str) -> Stack:
        A, B = (layout.of(self.batch.rows[layout], (self.layer, key, leaf)) for leaf in FACTORS)
        return Stack(slot, *shaped(self.layer, slot, A, B))

    def _updates(self, places: Places) -> list[LowRankUpdate | None]:
        keys = dict(places)
        return [
            a.updates[self.layer][keys[a.layout]] if a is not None and a.layout in keys else None
            for a in self.batch.adapters
        ]


class OwnValues:
    """The forward of a plain module whose weight or bias each adapter has for itself.

    Args:
        names: of those two that the adapters have, by leaf.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self.module, self.names, self.forward = module, names, FORWARDS[forward_of(module)]
        self.batch = NOTHING

    def begin(self, batch: Batch) -> None:
        """From now on the module computes for this batch."""
        self.batch = batch

    def __call__(self, x: Tensor) -> Tensor:
        n, dim = len(self.batch.samples), self.batch.samples.dim_of(x, self.module)
        x = x.movedim(dim, 0).unflatten(0, (n, -1))  # (n, k, ...): k inputs of each sample
        y = self.forward(self.module, x, self._each("weight", n), self._each("bias", n))
        return y.flatten(0, 1).movedim(0, dim)

    def _each(self, leaf: str, n: int) -> Tensor | None:
        """(n, *shape)"""
        if leaf in self.names:
            return self.batch.value(self.names[leaf])
        value = self.module._parameters[leaf]
        return None if value is None else value.expand(n, *value.shape)


def _linear(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tokens = x.flatten(1, -2)  # (n, tokens, in)
    y = torch.bmm(tokens, weight.mT) if bias is None else torch.baddbmm(bias[:, None], tokens, weight.mT)
    return y.unflatten(1, x.shape[1:-1])


def _layer_norm(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    norm = cast(nn.LayerNorm, module)
    y = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    shape = (len(x), *[1] * (x.dim() - weight.dim()), *weight.shape[1:])
    y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


FORWARDS: dict[Any, Callable[..., Tensor]] = {
    nn.Linear.forward: _linear,
    nn.LayerNorm.forward: _layer_norm,
}


def forward_of(module: nn.Module) -> Any:
    """The function that the module's own forward is."""
    return getattr(own_forward(module), "__func__", None)


def own_names(names: Mapping[str, str], path: str, module: nn.Module) -> dict[str, str]:
    """Of the module's own tensors those that adapters train, by leaf.

    Args:
        names: the name that a value has, by each of the tensor's names.
    """
    leaves = (*module._parameters, *module._buffers)
    return {leaf: names[joined(path, leaf)] for leaf in leaves if joined(path, leaf) in names}
