"""How long layers and their forms take on this machine, for a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.measure import run
from lora_lightning.adapters.unharmed import unharmed
from lora_lightning.utils.rng import random_state, set_random_state

ROUNDS = 7  # of which the median counts
LEAST = 1e-3  # seconds of the dense layer in a round, which calls it so often
POINTS = 8  # ranks that are measured of a form

Sizes = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


@dataclass(frozen=True)
class Candidate:
    """What may take a layer's place: how it is made, without values, and what it is called."""

    name: Hashable
    make: Callable[[], Callable[[Tensor], object]]


class Latency:
    """Measures layers at the sizes that their inputs have in one batch. Layers that are alike are measured
    once.

    Args:
        calls: of each layer the inputs' shapes, strides, dtypes and devices, as `calls_of` finds them.
    """

    def __init__(self, calls: Mapping[str, Sequence[Sizes]]) -> None:
        self.calls = calls
        self._known: dict[Hashable, dict[Hashable, int]] = {}

    def measure(
        self, name: str, key: Hashable, dense: Callable[[Tensor], object], candidates: Sequence[Candidate]
    ) -> tuple[int, list[int]]:
        """Nanoseconds of a layer in all its calls, and of each candidate: those of the layer times the median
        over the rounds of their ratio within a round.

        Args:
            key: equal for layers that take equally long at inputs of equal sizes.
            dense: the layer.
        """
        if not (calls := self.calls.get(name)):
            return 0, [0] * len(candidates)
        whole = (key, tuple(calls), tuple(c.name for c in candidates))
        if whole not in self._known:
            self._known[whole] = self._measured(dense, candidates, calls)
        found = self._known[whole]
        return found[None], [found[c.name] for c in candidates]

    def _measured(
        self, dense: Callable[[Tensor], object], candidates: Sequence[Candidate], calls: Sequence[Sizes]
    ) -> dict[Hashable, int]:
        with _undisturbed():
            inputs = [_input(sizes) for sizes in calls]
            ways: dict[Hashable, Callable[[Tensor], object]] = {None: dense}
            ways |= {c.name: c.make() for c in candidates}
            device = inputs[0].device
            for way in ways.values():  # the first call of a size makes its kernels
                _seconds(way, inputs, 1, device)
            often = max(1, round(LEAST / max(_seconds(dense, inputs, 1, device), 1e-9)))
            rounds = [{n: _seconds(w, inputs, often, device) for n, w in ways.items()} for _ in range(ROUNDS)]
        base = median(one[None] for one in rounds) / often
        return {n: round(1e9 * base * median(one[n] / one[None] for one in rounds)) for n in ways}


def calls_of(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, list[Sizes]]:
    """The sizes of the inputs of modules in a batch, by name; a call with anything but a tensor is none."""
    found: dict[str, list[Sizes]] = {name: [] for name in modules}

    def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(x := args[0], Tensor):
            found[name].append((tuple(x.shape), x.stride(), x.dtype, x.device))

    with unharmed(model):
        hooks = [m.register_forward_pre_hook(partial(see, name)) for name, m in modules.items()]
        try:
            run(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    return found


def thinned(items: Sequence[Any]) -> list[Any]:
    """At most POINTS of them, the first and the last among these."""
    if len(items) <= POINTS:
        return list(items)
    return [items[round(i * (len(items) - 1) / (POINTS - 1))] for i in range(POINTS)]


def chain(modules: Sequence[nn.Module]) -> nn.Sequential:
    """Modules without values, with some that no processor takes longer for."""
    made = nn.Sequential(*modules)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    return made


@contextmanager
def _undisturbed() -> Iterator[None]:
    random = random_state()
    try:
        with torch.no_grad():
            yield
    finally:
        set_random_state(random)


def _input(sizes: Sizes) -> Tensor:
    shape, stride, dtype, device = sizes
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(
        torch.randn(shape, device=device)
    )


def _seconds(way: Callable[[Tensor], object], inputs: Sequence[Tensor], often: int, device: Any) -> float:
    """Of one thread that of the processor, whatever else the machine does."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    _wait(device)
    start = clock()
    for _ in range(often):
        for x in inputs:
            way(x)
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
