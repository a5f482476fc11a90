"""Forming the merged weights of a model's layers of one shape together, before the later ones are asked
for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

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
    """A merged weight that waits for its layer, what it was formed of, and how."""

    merged: Merged | Whole
    given: Factors
    versions: list[float]
    how: tuple[object, ...]

    def fits(self, given: Factors, how: tuple[object, ...]) -> bool:
        for mine, theirs in zip(self.given, given, strict=True):
            if mine is not theirs:
                return False
        at_hand = self.merged.weight.is_inference() == torch.is_inference_mode_enabled()
        return at_hand and how == self.how and self.versions == _versions(given)


class Together:
    """Of one model: which layers have merged weights of one shape, in the order in which they are called.

    The first one that is asked for its weight forms those of the next ones as well, some 10 calls for all of
    them. Each is handed out once, and only if nothing was written into its parts since. When a backward
    begins, those that no layer asked for are dropped.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[object, ...], list[weakref.ref[Member]]] = {}
        self._places: dict[int, tuple[tuple[object, ...], int]] = {}  # by the layer's id, see `_place_of`
        self._ready: dict[int, _Ready] = {}  # by the layer's id; what it was formed of is the layer's alone

    def take(
        self, member: Member, given: Factors, scaling: float, dtype: torch.dtype, added: bool = True
    ) -> Any:
        """The merged weight of a layer, for products in `dtype`: `Merged` of a linear layer, `Whole` of a
        convolution.

        Args:
            given: what the layer computes with.
            added: as of `merge`.
        """
        how = scaling, dtype, added
        ready = self._ready.pop(id(member), None)
        if ready is not None and ready.fits(given, how):
            return ready.merged
        if torch._C._current_graph_task_id() != -1:  # a checkpointed part is computed again: this layer alone
            return _formed([given], *how)[0]
        members = [(member, given), *self._next(member, given, how)]
        formed = _formed([factored for _, factored in members], *how)
        for (other, factored), merged in zip(members[1:], formed[1:], strict=True):
            self._ready[id(other)] = _Ready(merged, factored, _versions(factored), how)
        return formed[0]

    def release(self) -> None:
        """Drop what no layer asked for."""
        self._ready.clear()

    def _next(
        self, member: Member, given: Factors, how: tuple[float, torch.dtype, bool]
    ) -> list[tuple[Member, Factors]]:
        """The layers of the same group that are called after this one, as many as `MOST` allows."""
        key, size = _key(given, how), given.weight.numel()
        place = self._place_of(member)
        if place is None or place[0] != key:
            group = self._groups.setdefault(key, [])
            while group and group[-1]() is None:  # copies that lived for a forward, as nn.DataParallel's
                group.pop()
            self._places[id(member)] = key, len(group)
            group.append(weakref.ref(member))
            return []
        found: list[tuple[Member, Factors]] = []
        for reference in self._groups[key][place[1] + 1 :]:
            if (len(found) + 2) * size > MOST:
                break
            other = reference()
            now = None if other is None else other.factored()
            if other is None or now is None or _key(now[0], (now[1], *how[1:])) != key:
                continue
            if (there := self._place_of(other)) is not None and there[0] == key:
                found.append((other, now[0]))
        return found

    def _place_of(self, member: Member) -> tuple[tuple[object, ...], int] | None:
        """A layer's group and place in it; None where it is new: its id may be of one that is gone."""
        key, index = self._places.get(id(member), ((), 0))
        group = self._groups.get(key, [])
        return (key, index) if index < len(group) and group[index]() is member else None


def _formed(layers: Sequence[Any], scaling: float, dtype: torch.dtype, added: bool) -> Sequence[Any]:
    if layers[0].weight.dim() > 2:
        return merge_whole(layers, scaling, dtype)
    return merge(layers, scaling, dtype, added)


def _key(given: Factors, how: tuple[object, ...]) -> tuple[object, ...]:
    """What layers have in common whose weights are formed together."""
    W, A, B, *more = given
    base = W.shape, W.stride(), W.dtype, W.device, type(W)
    return *base, A.shape, A.dtype, B.dtype, *(t is None for t in more), *how


def _versions(given: Factors) -> list[float]:
    """Changes with what is written into the tensors, or put into their places."""
    versions: list[float] = []
    for tensor in given:
        if tensor is None:
            continue
        if tensor.is_inference():  # it has no versions: nothing is taken for unchanged
            return [float("nan")]
        versions += tensor._version, tensor.data_ptr()
    return versions
