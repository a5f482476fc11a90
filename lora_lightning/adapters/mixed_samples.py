"""Samples of a batch that belong to different adapters: where they are, taken apart and put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.errors import UserError
from lora_lightning.layers.swap import class_of
from lora_lightning.utils.names import inside

# Modules whose input has the batch first, and whose other dimensions are no candidates.
BATCH_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)


class MixedSamples:
    """The adapter of each sample of a batch.

    Args:
        names: an adapter, or None for the base, for each sample.
        sequence_first: name of a module of the model that takes (time, batch, features), or "". In such
            a model an input has its samples where one dimension of the first two is their number.

    Attributes:
        distinct: the different names, in order of appearance.
        called: names of the modules that are called by samples, by identity, for messages.
    """

    def __init__(self, names: Sequence[str | None], sequence_first: str) -> None:
        self.names, self.sequence_first = tuple(names), sequence_first
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


def split_call(
    samples: MixedSamples,
    module: nn.Module,
    forward: Callable[..., Any],
    serve: Callable[[int], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call `forward` once for each adapter with its samples of the inputs; the samples of the outputs are put
    together again.

    Args:
        serve: makes a context in which `module` is that of the j-th adapter of the samples.

    Raises:
        UserError: the samples cannot be told in an input or an output.
    """
    if getattr(module, "training", False) and isinstance(module, _NormBase) and module.track_running_stats:
        raise UserError(
            f"mixed_adapters: {samples.where(module)} moves its running statistics in train mode, which "
            "samples of several adapters cannot share: call model.eval(), or train with train_norm='affine' "
            "at most."
        )
    if isinstance(module, nn.RNNBase) and args and isinstance(args[0], PackedSequence):
        return _split_packed(samples, module, forward, serve, args, kwargs)
    inputs, outputs = _dims(samples, module, args, kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    parts = []
    for j in range(len(samples.distinct)):
        mine = [x if d is None else samples.take(x, d, j) for x, d in zip(leaves, inputs, strict=True)]
        own_args, own_kwargs = tree_unflatten(mine, spec)
        with serve(j):
            parts.append(forward(*own_args, **own_kwargs))
    return _joined(samples, module, parts, outputs)


def _dims(
    samples: MixedSamples, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[int | None], Callable[[int], int]]:
    """The batch dimension of each leaf of (args, kwargs), None for what all samples share; and of each leaf
    of the output."""
    leaves, _ = tree_flatten((args, kwargs))
    if class_of(module).forward is nn.MultiheadAttention.forward:
        return attention_dims(samples, module, args, kwargs)
    if isinstance(module, nn.RNNBase):
        x = leaves[0]
        if x.dim() != 3:
            raise UserError(
                f"mixed_adapters: the input of {samples.where(module)} has no batch dimension: add one, "
                "x[None]."
            )
        dim = 0 if module.batch_first else 1
        samples.check(x, dim, module)
        return [dim, *[1 if isinstance(t, Tensor) else None for t in leaves[1:]]], lambda i: 1 if i else dim
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim()]
    if not tensors:
        raise UserError(
            f"mixed_adapters: {samples.where(module)} is called without a tensor that has "
            "samples: leave it out of the adapters (exclude_modules)."
        )
    if isinstance(module, nn.EmbeddingBag) and tensors[0].dim() != 2:
        raise UserError(
            f"mixed_adapters: {samples.where(module)} is called with offsets: give it a matrix, one row a "
            "bag."
        )
    dim = samples.dim_of(tensors[0], module)
    for other in tensors[1:]:
        if other.dim() <= dim or other.shape[dim] != tensors[0].shape[dim]:
            raise UserError(
                f"mixed_adapters: {samples.where(module)} is called with {tuple(tensors[0].shape)} and "
                f"{tuple(other.shape)}: it cannot be told whether the second has samples. Leave this module "
                "out of the adapters, or run the samples of each adapter by themselves."
            )
    return [dim if isinstance(t, Tensor) and t.dim() else None for t in leaves], lambda i: dim


def attention_dims(
    samples: MixedSamples, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[int | None], Callable[[int], int]]:
    names = list(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]
    dim = 0 if module.batch_first else 1
    dims: list[int | None] = []
    for name, x in [*zip(names, args, strict=False), *kwargs.items()]:
        of = dim if name in ("query", "key", "value") else 0
        shared = not isinstance(x, Tensor) or (name == "attn_mask" and x.dim() == 2)
        if not shared and x.dim() != (2 if name == "key_padding_mask" else 3):
            raise UserError(
                f"mixed_adapters: the {name} of {samples.where(module)} has no batch dimension: add one, "
                "x[None]."
            )
        if not shared and name != "attn_mask":
            samples.check(x, of, module)
        dims.append(None if shared else of)
    return dims, lambda i: 0 if i else dim


def _joined(samples: MixedSamples, module: nn.Module, parts: list[Any], dims: Callable[[int], int]) -> Any:
    flat = [tree_flatten(part) for part in parts]
    joined = []
    for i, leaves in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        if not isinstance(leaves[0], Tensor):
            joined.append(leaves[0])
            continue
        dim = dims(i)
        if any(t.dim() <= dim or t.shape[dim] % samples.count(j) for j, t in enumerate(leaves)):
            raise UserError(
                f"mixed_adapters: an output of {samples.where(module)}, {tuple(leaves[0].shape)}, has no "
                "samples to be put together: leave this module out of the adapters."
            )
        joined.append(samples.join(list(leaves), dim))
    return tree_unflatten(joined, flat[0][1])


def _split_packed(
    samples: MixedSamples,
    module: nn.RNNBase,
    forward: Callable[..., Any],
    serve: Callable[[int], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Packed sequences: padded, split, packed again, and the outputs likewise."""
    packed, (states, spec) = args[0], tree_flatten((args[1:], kwargs))
    x, lengths = pad_packed_sequence(packed, batch_first=True)
    samples.check(x, 0, module)
    outputs, finals = [], []
    for j in range(len(samples.distinct)):
        mine = pack_padded_sequence(
            samples.take(x, 0, j), samples.take(lengths, 0, j), batch_first=True, enforce_sorted=False
        )
        more, named = tree_unflatten([samples.take(s, 1, j) for s in states], spec)
        with serve(j):
            y, final = forward(mine, *more, **named)
        outputs.append(pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0])
        finals.append(final)
    y = samples.join(outputs, 0)
    sorted_before = packed.sorted_indices is None
    whole = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=sorted_before)
    return whole, _joined(samples, module, finals, lambda i: 1)
