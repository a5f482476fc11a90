"""What files say of a base: its fingerprint and how its weights are quantized, looked at once a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.state import is_injected, state_of
from lora_lightning.files.fingerprint import frozen_tensors
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.layers.registry import lora_layers
from lora_lightning.utils.digests import digests
from lora_lightning.utils.names import joined, named_modules
from lora_lightning.utils.sharding import is_flattened


@dataclass(frozen=True)
class FrozenBase:
    """What files say of a base.

    Attributes:
        fingerprint: digests of the frozen tensors by name, see `fingerprint_of`.
        quantized: "int8" or "nf4" by the names of those that are so kept.
    """

    fingerprint: dict[str, str]
    quantized: dict[str, str]


def frozen_base(model: nn.Module) -> FrozenBase:
    """The base of a model, of its values of now."""
    tensors = frozen_tensors(model)
    quantized = {n: t.kind for n, t in tensors.items() if isinstance(t, QuantizedTensor)}
    return FrozenBase({} if is_flattened(model) else digests(tensors), quantized)


@dataclass(frozen=True)
class Mark:
    """By what it is seen that a tensor of a model has changed: another stands in its place, it trains or
    does so no more, or, where its values count, it was written to. No reference to the tensor is kept, weak
    or not: torch exchanges the insides of those without one alone, as when a quantized model moves."""

    module: nn.Module
    leaf: str
    identity: int
    trains: bool
    written: tuple[Any, ...] | None

    def holds(self) -> bool:
        here = {**self.module._buffers, **self.module._parameters}.get(self.leaf)
        if here is None or id(here) != self.identity or here.requires_grad != self.trains:
            return False
        return self.written is None or self.written == _written(here)


class KnownBase:
    """The base of a model through a run: looked at when it is first asked for, and again when something of it
    has changed since, as torch counts changes. What is written by way of `.data`, which torch does not
    count, is seen by the next run.

    Args:
        model: adapted; merged, it is looked at each time.
        fixed: look at it now and never again, as where it will be sharded.
    """

    def __init__(self, model: nn.Module, fixed: bool = False) -> None:
        self.model, self.fixed = model, fixed
        self._base: FrozenBase | None = frozen_base(model) if fixed else None
        self._marks: list[Mark] = []
        self._version = -1

    def now(self) -> FrozenBase:
        """The base of the values of now."""
        if self._base is None or not (self.fixed or self._is_unchanged()):
            self._base = frozen_base(self.model)
            self._marks = list(_marks(self.model, self._base.fingerprint))
            self._version = _version(self.model)
        return self._base

    def _is_unchanged(self) -> bool:
        return 0 <= self._version == _version(self.model) and all(mark.holds() for mark in self._marks)

    def __getstate__(self) -> dict[str, Any]:
        """Without the marks, which are of these very tensors: a copy of the model looks for itself."""
        kept: dict[str, Any] = {"_base": self._base if self.fixed else None, "_marks": [], "_version": -1}
        return {**self.__dict__, **kept}


def _version(model: nn.Module) -> int:
    """A number that changes with the choice of adapters; -1 where there is nothing to go by."""
    if not is_injected(model) or any(layer.lora_merged for layer in lora_layers(model).values()):
        return -1
    return state_of(model).choice.version


def _marks(model: nn.Module, frozen: Collection[str]) -> Iterator[Mark]:
    """Of every parameter of the model, and of every buffer that is a part of the base."""
    for path, module in named_modules(model).items():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            counts = joined(path, leaf) in frozen
            if tensor is not None and (counts or isinstance(tensor, nn.Parameter)):
                written = _written(tensor) if counts else None
                yield Mark(module, leaf, id(tensor), tensor.requires_grad, written)


def _written(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor gets other values or other memory."""
    if isinstance(tensor, QuantizedTensor):
        return (tensor.digest,)
    return (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
