"""The choices of every layer of a model, with what each costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from lora_lightning.compression.allocate import Choice, worthwhile
from lora_lightning.compression.form import MATRIX_STEP, Layer, kind_of, ranks_for
from lora_lightning.compression.forms import FORMS, forms_of
from lora_lightning.compression.held import Held
from lora_lightning.compression.latency import Candidate, Latency, calls_of, chain, thinned
from lora_lightning.compression.recurrent import FORM, Stack
from lora_lightning.compression.work import Work
from lora_lightning.utils.progress import working

SLOWER = "no form of it is faster on this machine"
UNCALLED = "the first batch does not call it with a tensor, so that its time is not known"


def gather(work: Work, model: nn.Module, batch: Any) -> None:
    """Find the choices of every layer that save parameters and FLOPs, and time where that is what counts.

    Args:
        batch: the sizes for which time is measured.
    """
    latency = None
    if work.counts == "latency":
        called = {n: m for n, m in work.layers.items() if isinstance(m, nn.Module)}
        latency = Latency(calls_of(model, called | {n: s.module for n, s in work.stacks.items()}, batch))
    for name, layer in working(work.layers.items(), "taking weights apart", "layers"):
        some = _choices(work, name, layer)
        if latency and not isinstance(layer, Held):
            some = _timed(work, latency, name, some, _options(layer), layer, partial(_form, layer))
        work.choices[name] = worthwhile(some)
    for name, stack in working(work.stacks.items(), "taking LSTMs apart", "layers"):
        dense = work.dense(name)
        some = [work.choice(name, FORM, (r,), stack.lost(r)) for r in ranks_for(stack.hidden, MATRIX_STEP)]
        if latency is None:
            some = [c for c in some if c.cost < dense.cost]
        else:
            key = stack.shape, tuple(m.out_features for m in stack.readers.values())
            some = thinned(worthwhile(some))
            some = _timed(work, latency, name, some, key, _read(stack, None), partial(_stack, stack))
        work.choices[name] = worthwhile(some)


def _choices(work: Work, name: str, layer: Layer) -> list[Choice]:
    """Of a layer, in each form the cheapest first."""
    moment, dense = work.moment(name), work.dense(name)
    found: list[Choice] = []
    for form, about in forms_of(layer, moment).items():
        if work.counts != "parameters" and about.parameters_alone:
            work.left[name] = about.parameters_alone
            continue
        some = []
        for rank, lost in about.solve(layer, layer.weight.double(), moment).errors():
            choice = work.choice(name, form, rank, lost)
            less = about.parameters_alone or choice.flops is None or choice.flops < (dense.flops or 0)
            if choice.parameters < dense.parameters and less:
                some.append(choice)
        found += thinned(worthwhile(some)) if work.counts == "latency" else some
    return found


def _timed(
    work: Work,
    latency: Latency,
    name: str,
    some: Sequence[Choice],
    key: Hashable,
    dense: Callable[[Tensor], object],
    make: Callable[[Choice], Callable[[Tensor], object]],
) -> list[Choice]:
    """The choices that are faster than the layer, with their time as their cost."""
    candidates = [Candidate((c.form, c.rank), partial(make, c)) for c in some]
    whole, times = latency.measure(name, key, dense, candidates)
    work.times[name] = whole
    found = [replace(c, cost=time) for c, time in zip(some, times, strict=True) if time < whole]
    if some and not found:
        work.left[name] = SLOWER if whole else UNCALLED
    return found


def _options(layer: Any) -> Hashable:
    """What decides, beside the sizes of its inputs, how long a layer takes."""
    names = ("stride", "padding", "dilation", "padding_mode")
    about = tuple(getattr(layer, name, None) for name in names)
    return kind_of(layer), tuple(layer.weight.shape), layer.weight.dtype, layer.weight.stride(), about


def _form(layer: Layer, choice: Choice) -> nn.Sequential:
    return chain(FORMS[choice.form].modules(layer, choice.rank))


def _stack(stack: Stack, choice: Choice) -> Callable[[Tensor], object]:
    return _read(stack, choice.rank[0])


def _read(stack: Stack, rank: int | None) -> Callable[[Tensor], object]:
    """An LSTM and what reads it, as they are or with a projection."""
    new: dict[str, nn.Module] = {"": stack.module, **stack.readers}
    if rank is not None:
        new = copy.deepcopy(stack.empty(rank))  # its biases are the model's own
        chain(list(new.values()))
    lstm = cast(nn.LSTM, new.pop(""))

    def forward(x: Tensor) -> None:
        out = lstm(x)[0]
        for reader in new.values():
            reader(out)

    return forward
