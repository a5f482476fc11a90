"""The LSTMs of a model that are compressed, with their readers; found by data, or by a description."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lora_lightning.compression.recurrent import Stack
from lora_lightning.compression.recurrent_inputs import watch
from lora_lightning.compression.recurrent_readers import lstms_of, readers_of
from lora_lightning.planning.patterns import matches
from lora_lightning.utils.names import named_modules

WITHOUT = "what reads its outputs is seen in data alone: give data="


def stacks_of(
    model: nn.Module,
    layers: dict[str, Any],
    left: dict[str, str],
    exclude: str | Iterable[str],
    data: Sequence[Any] | None,
    plain: bool,
) -> dict[str, Stack]:
    """LSTMs that can have a projection, by name.

    Args:
        layers: the other layers that can be compressed; readers are taken out.
        left: gets why other recurrent layers stay as they are.
        exclude: names or patterns.
        data: batches.
        plain: whether the weights alone count.
    """
    patterns = exclude if isinstance(exclude, str) else list(exclude)
    excluded = {n for n in named_modules(model) if patterns and matches(n, patterns)}
    found, reasons = lstms_of(model, excluded)
    left |= reasons
    if data is None:
        left |= dict.fromkeys(found, WITHOUT)
        return {}
    read: dict[str, dict[str, nn.Linear]] = {}
    for name, lstm in found.items():
        linears = {n: m for n, m in layers.items() if isinstance(m, nn.Linear)}
        readers = readers_of(model, name, lstm, linears, data[0])
        if isinstance(readers, str):
            left[name] = readers
        else:
            read[name] = readers
            for reader in readers:
                del layers[reader]
    shown = watch(model, {n: found[n] for n in read}, data, plain) if read else {}
    return {name: Stack(found[name], readers, shown[name]) for name, readers in read.items()}


def in_place(stacks: Mapping[str, Stack]) -> dict[str, nn.Module]:
    """The modules that are replaced, by name."""
    found: dict[str, nn.Module] = {}
    for name, stack in stacks.items():
        found |= {name: stack.module, **stack.readers}
    return found


def described(
    model: nn.Module, name: str, shape: tuple[int, ...], rank: tuple[int, ...], readers: Any
) -> Stack | str:
    """The LSTM that a description means, or what is wrong."""
    found, left = lstms_of(model, set())
    if name not in found:
        return f"there is no LSTM {name!r} that can have a projection: {left.get(name, 'no such layer')}"
    named = [readers] if isinstance(readers, str) or not isinstance(readers, list) else readers
    modules: dict[str, nn.Linear] = {}
    every = named_modules(model, all_names=True)
    for reader in named:
        module = every.get(reader) if isinstance(reader, str) else None
        if not isinstance(module, nn.Linear):
            return f"{name} is read by {reader!r}, which is no linear layer here"
        modules[reader] = module
    stack = Stack(found[name], modules)
    width = stack.hidden * stack.ways
    if stack.shape != shape or any(m.in_features != width for m in modules.values()):
        return f"{name} is LSTM {shape} there, {stack.shape} here"
    if len(rank) != 1 or not rank[0] < stack.hidden:
        return f"{name} cannot have the form 'projected' with rank {'x'.join(map(str, rank))}"
    return stack
