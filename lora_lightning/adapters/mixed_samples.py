"""Samples of a batch that belong to different adapters: where they are in the input of a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lora_lightning.errors import UserError
from lora_lightning.utils.names import inside

# Modules whose input has the batch first, and whose other dimensions are no candidates.
BATCH_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)


class MixedSamples:
    """The adapter of each sample of a batch.

    Args:
        names: an adapter, or None for the base, for each sample.
        sequence_first: name of a module of the model that takes (time, batch, features), or "". In such
            a model an input has its samples where one dimension of the first two is their number.
        modules: the model's, whose own tensors are no sample's.

    Attributes:
        distinct: the different names, in order of appearance.
        called: names of the modules that are called by samples, by identity, for messages.
    """

    def __init__(
        self, names: Sequence[str | None], sequence_first: str, modules: Iterable[nn.Module]
    ) -> None:
        self.names, self.sequence_first, self.modules = tuple(names), sequence_first, modules
        self.distinct = tuple(dict.fromkeys(names))
        self.called: dict[int, str] = {}
        self._devices: dict[tuple[Any, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _index(self) -> Tensor:
        return torch.tensor([self.distinct.index(n) for n in self.names])

    @cached_property
    def _of(self) -> list[Tensor]:
        return [torch.nonzero(self._index == j).flatten() for j in range(len(self.distinct))]

    @cached_property
    def _back(self) -> Tensor | None:
        order = torch.cat(self._of)
        return None if torch.equal(order, torch.arange(len(order))) else order.argsort()

    @cached_property
    def _own(self) -> set[int]:
        """Where the memory of the model's own tensors begins."""
        tensors = (t for m in self.modules for t in (*m._parameters.values(), *m._buffers.values()))
        return {_begin(t) for t in tensors if t is not None} - {0}

    def is_own(self, x: Tensor) -> bool:
        """Whether x is a tensor of the model's own, as a table of positions is, not repeated for samples."""
        return 0 not in x.stride() and _begin(x) in self._own

    def index(self, device: torch.device) -> Tensor:
        """Row -> position in `distinct`."""
        return self._on("index", self._index, device)

    def by_sample(self, values: list[Tensor]) -> Tensor:
        """What each of `distinct` has, stacked for each sample."""
        stacked = torch.stack(values)
        return stacked if len(values) == len(self) else stacked[self.index(stacked.device)]

    def count(self, j: int) -> int:
        """How many samples the j-th of `distinct` has."""
        return len(self._of[j])

    def refuse_reading(self, path: str) -> None:
        """Refuse to read the weight of the module of this path outside of its own call."""
        raise UserError(
            f"mixed_adapters: {path or 'the model'} is not called, its weight is read by another module, "
            "and so cannot differ from sample to sample. Run the samples of each adapter by themselves with "
            "set_adapter(model, name), or leave this layer out of the adapters (exclude_modules)."
        )

    def where(self, module: nn.Module) -> str:
        """Name of a module that is called by samples."""
        return self.called.get(id(module)) or type(module).__name__

    def take(self, x: Tensor, dim: int, j: int) -> Tensor:
        """The samples of the j-th of `distinct` along `dim`, which holds a multiple of the samples."""
        if dim == 0 and x.shape[0] == len(self):
            return x.index_select(0, self._on(("of", j), self._of[j], x.device))
        samples = x.unflatten(dim, (len(self), -1))
        return samples.index_select(dim, self._on(("of", j), self._of[j], x.device)).flatten(dim, dim + 1)

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """The inverse of `take` for all of `distinct`."""
        samples = torch.cat([p.unflatten(dim, (self.count(j), -1)) for j, p in enumerate(parts)], dim)
        if self._back is not None:
            samples = samples.index_select(dim, self._on("back", self._back, samples.device))
        return samples.flatten(dim, dim + 1)

    def dim_of(self, x: Tensor, module: nn.Module) -> int:
        """The dimension of x, the input of `module`, along which the samples lie; there is a multiple of
        them, each sample's together.

        Raises:
            UserError: there is none, or it cannot be told.
        """
        n, where = len(self), self.where(module)
        if self.is_own(x) or (isinstance(module, nn.Embedding) and _are_positions(x, n)):
            raise UserError(
                f"mixed_adapters: the input of {where}, {tuple(x.shape)}, is a table or positions that all "
                "samples share: leave this layer out of the adapters (exclude_modules)."
            )
        first = isinstance(module, BATCH_FIRST)
        if isinstance(module, _ConvNd) and x.dim() != len(module.kernel_size) + 2:
            raise UserError(
                f"mixed_adapters: the input of {where}, {tuple(x.shape)}, has no batch dimension: add "
                "one, x[None]."
            )
        features = len(module.normalized_shape) if isinstance(module, nn.LayerNorm) else 1
        leading = x.dim() - (0 if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else features)
        candidates = [d for d in range(1 if first else min(leading, 2)) if x.shape[d] == n]
        if self.sequence_first:
            if len(candidates) == 1:
                return candidates[0]
            found = "twice" if candidates else "nowhere"
            raise UserError(
                f"mixed_adapters: the {n} samples are {found} among the first dimensions of "
                f"{tuple(x.shape)}, the "
                f"input of {where}, and the model takes sequences first in {self.sequence_first}: give a "
                "batch with another number of samples or time steps, or leave this layer out of the adapters."
            )
        if 0 in candidates:
            return 0
        if leading < 1 or x.shape[0] % n or candidates or x.shape[0] == 0:
            raise UserError(
                f"mixed_adapters: the first dimension of {tuple(x.shape)}, the input of {where}, is to hold "
                f"the {n} samples, or a multiple of them with each sample's together"
                f"{', and the second could hold them as well' if candidates else ''}. Give one adapter for "
                "each sample of the batch, or leave this layer out of the adapters (exclude_modules)."
            )
        return 0

    def check(self, x: Tensor, dim: int, module: nn.Module) -> None:
        """Refuse an input whose dimension `dim`, known to be the batch, holds no multiple of the samples."""
        n, size = len(self), x.shape[dim]
        if size == 0 or size % n or (self.sequence_first and size != n):
            raise UserError(
                f"mixed_adapters: {self.where(module)} is called with a batch of {size}, and there are {n} "
                "samples: give one adapter for each sample of the batch."
            )

    def _on(self, key: Any, values: Tensor, device: torch.device) -> Tensor:
        if (key, device) not in self._devices:
            self._devices[key, device] = values.to(device)
        return self._devices[key, device]


def _begin(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 of one that is made of others, as quantized ones are."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0


def _are_positions(i: Tensor, n: int) -> bool:
    """Whether the indices of an embedding are positions in order, or the distances of all from all, which do
    not change along a diagonal."""
    if i.dim() == 2 and min(i.shape) > 1:
        return torch.equal(i[1:, 1:], i[:-1, :-1]) and not torch.equal(i[0, 0], i[-1, 0])
    if i.dim() > 1 and i.numel() > n:
        return False
    return torch.equal(i.flatten(), torch.arange(i.numel(), device=i.device) + i.flatten()[:1])


def taking_boxes(modules: Mapping[str, nn.Module], called: Iterable[str]) -> str:
    """The first of these modules whose rows are the boxes of pictures, of each as many as were found, or "":
    where their number is a multiple of the samples they would be dealt out wrongly."""
    parents = [path for path, module in modules.items() if any(map(_pools_boxes, module.children()))]
    return next((path for path in called if inside(path, parents)), "")


def refuse_boxes(path: str) -> None:
    """Refuse a module that takes boxes.

    Raises:
        UserError: there is one.
    """
    if path:
        raise UserError(
            f"mixed_adapters: the rows of {path} are the boxes of all pictures, and it cannot be told whose "
            "each is. Run the samples of each adapter by themselves with set_adapter(model, name), or leave "
            "this layer out of the adapters (exclude_modules)."
        )


def _pools_boxes(module: nn.Module) -> bool:
    """By the name of its class, since importing torchvision takes longer than this whole package."""
    return any(
        "RoI" in c.__name__ and c.__module__.startswith("torchvision.ops") for c in type(module).__mro__
    )
