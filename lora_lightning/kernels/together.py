"""Forming the merged weights of a model's layers of one shape together, before the later ones are asked
for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_lightning.kernels.merge import Factored, Merged, merge
from lora_lightning.kernels.merge_whole import FactoredKernel, Whole, merge_whole

Factors = Factored | FactoredKernel
MOST = 2**25  # numbers of the weights that are formed at a time: 128 MiB in float32, in passing


class Member(Protocol):
    """A layer whose merged weight is formed with others'."""

    @property
    def together(self) -> Together:
        """What forms it."""

    def factored(self) -> tuple[Factors, float] | None:
        """What it computes with now, and its scaling; None without one update of the whole weight."""


class _Ready(NamedTuple):
    """A merged weight that waits for its layer, and what it was formed of."""

    merged: Merged | Whole
    tensors: Factors
    versions: tuple[int, ...]

    def fits(self, tensors: Factors) -> bool:
        same = all(mine is theirs for mine, theirs in zip(self.tensors, tensors, strict=True))
        at_hand = self.merged.weight.is_inference() == torch.is_inference_mode_enabled()
        return same and at_hand and self.versions == _versions(tensors)


class Together:
    """Of one model: which layers have merged weights of one shape, in the order in which they are called.

    The first one that is asked for its weight forms those of the next ones as well, some 8 calls for all of
    them. Each is handed out once, and only if nothing was written into its parts since. When a backward
    begins, those that no layer asked for are dropped.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[object, ...], list[weakref.ref[Member]]] = {}
        self._places: weakref.WeakKeyDictionary[Member, tuple[tuple[object, ...], int]] = (
            weakref.WeakKeyDictionary()
        )
        self._ready: weakref.WeakKeyDictionary[Member, _Ready] = weakref.WeakKeyDictionary()

    def take(
        self, member: Member, given: Factors, scaling: float, dtype: torch.dtype, added: bool = True
    ) -> Any:
        """The merged weight of a layer, for products in `dtype`: `Merged` of a linear layer, `Whole` of a
        convolution.

        Args:
            given: what the layer computes with.
            added: as of `merge`.
        """
        key = _key(given, scaling, dtype, added)
        ready = self._ready.pop(member, None)
        if ready is not None and self._places[member][0] == key and ready.fits(given):
            return ready.merged
        if torch._C._current_graph_task_id() != -1:  # a checkpointed part is computed again: this layer alone
            return _formed([given], scaling, dtype, added)[0]
        members = [(member, given), *self._next(member, key, given.weight.numel(), dtype, added)]
        formed = _formed([factored for _, factored in members], scaling, dtype, added)
        for (other, factored), merged in zip(members[1:], formed[1:], strict=True):
            self._ready[other] = _Ready(merged, factored, _versions(factored))
        return formed[0]

    def release(self) -> None:
        """Drop what no layer asked for."""
        self._ready.clear()

    def _next(
        self, member: Member, key: tuple[object, ...], size: int, dtype: torch.dtype, added: bool
    ) -> list[tuple[Member, Factors]]:
        """The layers of the same group that are called after this one, as many as `MOST` allows of `size`
        numbers."""
        known = self._places.get(member)
        if known is None or known[0] != key:
            group = self._groups.setdefault(key, [])
            self._places[member] = key, len(group)
            group.append(weakref.ref(member))
            return []
        found: list[tuple[Member, Factors]] = []
        for reference in self._groups[key][known[1] + 1 :]:
            if (len(found) + 2) * size > MOST:
                break
            other = reference()
            now = None if other is None else other.factored()
            if (
                other is None
                or now is None
                or self._places[other][0] != key
                or _key(*now, dtype, added) != key
            ):
                continue
            found.append((other, now[0]))
        return found


def _formed(layers: Sequence[Any], scaling: float, dtype: torch.dtype, added: bool) -> Sequence[Any]:
    if layers[0].weight.dim() > 2:
        return merge_whole(layers, scaling, dtype)
    return merge(layers, scaling, dtype, added)


def _key(given: Factors, scaling: float, dtype: torch.dtype, added: bool) -> tuple[object, ...]:
    """What layers have in common whose weights are formed together."""
    W, A, B, *more = given
    base = W.shape, W.stride(), W.dtype, W.device, type(W)
    return *base, A.shape, A.dtype, B.dtype, *(t is None for t in more), scaling, dtype, added


def _versions(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Changes with what is written into the tensors, or put into their places."""
    return tuple(n for t in tensors if t is not None for n in (t._version, t.data_ptr()))
