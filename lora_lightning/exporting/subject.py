"""What is exported: a plain network with named inputs and outputs, and the axes whose sizes may differ."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_lightning.adapters.eject import eject
from lora_lightning.errors import ConfigError, UserError, did_you_mean
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.layers.registry import lora_layers
from lora_lightning.utils import copying
from lora_lightning.utils.marks import is_whole

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Axes = dict[str, dict[int, str]]  # of inputs, by dimension: their names
BATCH = "batch"
AXES_BY_INPUT = 'by input the names of axes, {"x": {0: "batch"}}'


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        model: inputs in their order -> a tuple of tensors; in eval mode, on the CPU, without adapters.
        network: the plain network in it, under its own names.
        inputs: an example by name, no dynamic axis of which has the size 1.
        dynamic: the axes whose sizes may differ, of some inputs: dimension -> name. Those of one name agree.
        outputs: the names of what comes out.
        guards: the conditions on sizes under which the graph was traced, as torch writes them; filled when
            it is.
    """

    model: nn.Module
    network: nn.Module
    inputs: dict[str, Tensor]
    dynamic: Axes
    outputs: tuple[str, ...]
    guards: list[str] = field(default_factory=list, kw_only=True)


class Flat(nn.Module):
    """A network behind plain arguments: inputs in their order -> a tuple of the tensors that come out.

    Args:
        names: of the network's arguments, in the order of the inputs.
        shown: mean and deviation of pictures, (3, 1, 1), where the first input is bytes; else None.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], shown: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.network, self.names = network, tuple(names)
        for name, value in zip(("mean", "std"), shown or (None, None), strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        first, *others = inputs
        if isinstance(self.mean, Tensor) and isinstance(self.std, Tensor):
            first = (first.float() / 255 - self.mean) / self.std
        found = self.network(**dict(zip(self.names, (first, *others), strict=True)))
        return tuple(tensor for _, tensor in named_outputs(found))


def subject_of(
    model: nn.Module, inputs: Mapping[str, Tensor], dynamic: Axes, shown: Mapping[str, Any] | None
) -> Subject:
    """A plain copy of a model, and what belongs to it. The model is as it was.

    Args:
        inputs: an example by the names of the model's arguments; the first is bytes where `shown`.
        shown: how pictures are normalized, where this is to be a part of the model.

    Raises:
        UserError: the model does not take the example, or gives no tensors.
    """
    network = copied(model)
    if lora_layers(network):
        eject(network, merged=True)
    in_floats(network)
    network = network.eval().requires_grad_(False).cpu()
    flat = Flat(network, list(inputs), normalization(shown)).eval()
    large = {name: enlarged(tensor, dynamic.get(name, {})) for name, tensor in inputs.items()}
    return Subject(flat, network, large, dynamic, output_names(network, flat, large) if inputs else ())


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model without the Trainer that a LightningModule belongs to."""
    trainer = getattr(model, "_trainer", None)
    if trainer is None:
        return copying.copied(model)
    model._trainer = None  # type: ignore[assignment]  # of a module that has one
    try:
        return copying.copied(model)
    finally:
        model._trainer = trainer


def normalization(shown: Mapping[str, Any] | None) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation as tensors (3, 1, 1)."""
    if shown is None:
        return None
    mean, std = (torch.tensor(shown[name]).float().view(-1, 1, 1) for name in ("mean", "std"))
    return mean, std


def to_bytes(pictures: Tensor, shown: Mapping[str, Any]) -> Tensor:
    """Pictures (batch, 3, height, width) that mean and std have normalized, as the bytes that they were."""
    mean, std = (torch.tensor(shown[name]).float().view(-1, 1, 1) for name in ("mean", "std"))
    return ((pictures * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def inputs_of(model: nn.Module, example: Example, option: str = "example") -> dict[str, Tensor]:
    """An example by the names of the arguments of the model's `forward`, on the CPU, copied and contiguous: a
    trace of a slice has guards on its strides, and a file of a slice all that it is a part of.

    Args:
        option: that it was given as, for errors.

    Raises:
        UserError: it is no tensors, or does not fit the arguments.
    """
    takes = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    given: dict[str, Any]
    if isinstance(example, Mapping):
        given = dict(example)
        if strange := [name for name in given if name not in takes]:
            near = did_you_mean(strange[0], takes)
            raise UserError(
                f"{option}: {type(model).__name__} takes no {strange[0]!r}.{near} "
                f"It takes {', '.join(takes)}."
            )
    else:
        several = list(example) if isinstance(example, (list, tuple)) else [example]
        if len(several) > len(takes):
            raise UserError(
                f"{option}: {len(several)} inputs for {type(model).__name__}, which takes "
                f"{', '.join(takes)}: give no more."
            )
        given = dict(zip(takes, several, strict=False))
    if not given or not all(isinstance(value, Tensor) for value in given.values()):
        kinds = ", ".join(type(value).__name__ for value in given.values()) or "nothing"
        raise UserError(
            f"{option}: give a tensor, a tuple of tensors, or a dictionary of them; these are {kinds}."
        )
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in given.items()
    }


def axes_of(inputs: Mapping[str, Tensor], dynamic: bool | Mapping[str, Mapping[int, str]]) -> Axes:
    """The dynamic axes, by input.

    Raises:
        ConfigError: one line for each that is none.
    """
    if dynamic is True:
        return {name: {0: BATCH} for name, value in inputs.items() if value.ndim}
    if dynamic and not isinstance(dynamic, Mapping):
        raise ConfigError([f"dynamic={dynamic!r}: give true, false, or {AXES_BY_INPUT}."])
    found: Axes = {}
    problems = []
    for name, axes in (dynamic or {}).items():
        if name not in inputs:
            near = did_you_mean(name, inputs)
            problems.append(f"dynamic={name!r}: is no input.{near} Inputs: {', '.join(inputs)}.")
            continue
        if not isinstance(axes, Mapping):
            problems.append(f"dynamic: {name}: {axes!r} names no axes: give {AXES_BY_INPUT}.")
            continue
        rank = inputs[name].ndim
        wrong = [axis for axis in axes if not is_whole(axis) or not 0 <= axis < rank]
        problems += [
            f"dynamic: {name} has the axes 0 to {rank - 1}, and none {axis!r}: give one of these."
            for axis in wrong
        ]
        unfit = [text for text in axes.values() if not (isinstance(text, str) and text.isidentifier())]
        problems += [f"dynamic: {name}: {text!r} is no name of an axis: give letters." for text in unfit]
        found[name] = {axis: axes[axis] for axis in axes if axis not in wrong}
    sizes: dict[str, int] = {}
    for name, axes in found.items():
        for axis, text in axes.items():
            size = inputs[name].shape[axis]
            if sizes.setdefault(text, size) != size:
                problems.append(
                    f"dynamic: the axis {text!r} has {sizes[text]} and {size} entries in the example: give "
                    "axes of different sizes different names."
                )
    if problems:
        raise ConfigError(problems)
    return {name: axes for name, axes in found.items() if axes}


def named_outputs(found: Any) -> list[tuple[str, Tensor]]:
    """The tensors in what a network gives, by name: keys of a mapping or a dataclass, else numbers."""
    if isinstance(found, Tensor):
        return [("output", found)]
    if isinstance(found, Mapping):
        parts = [(str(key), value) for key, value in found.items()]
    elif is_dataclass(found):
        parts = [(one.name, getattr(found, one.name)) for one in fields(found)]
    elif hasattr(found, "_fields"):
        parts = list(zip(found._fields, found, strict=True))
    else:
        parts = [(f"output_{number}", value) for number, value in enumerate(tree_leaves(found))]
    named = []
    for name, value in parts:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        named += [(name if len(tensors) == 1 else f"{name}_{number}", t) for number, t in enumerate(tensors)]
    return named


@torch.no_grad()
def output_names(network: nn.Module, flat: Flat, inputs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of what the network gives for an example.

    Raises:
        UserError: it does not take the example, or gives no tensors.
    """
    names: list[str] = []
    hook = network.register_forward_hook(lambda _m, _i, out: names.extend(n for n, _ in named_outputs(out)))
    try:
        with refused(network, inputs, "Give another example."):
            flat(*inputs.values())
    finally:
        hook.remove()
    if not names:
        raise UserError(f"export: {type(network).__name__} gives no tensors. Give a model that does.")
    taken = set(inputs)
    return tuple(f"{name}_out" if name in taken else name for name in names)


@contextlib.contextmanager
def refused(network: nn.Module, inputs: Mapping[str, Tensor], remedy: str) -> Iterator[None]:
    """Around a call of a network: one message where it does not take the inputs."""
    try:
        yield
    except Exception as error:  # the libraries' own, for whatever an input may be
        reason = " ".join(str(error).split())[:240].rstrip(".") or type(error).__name__
        raise UserError(
            f"export: {type(network).__name__} does not take {sizes_of(inputs)}: {reason}. {remedy}"
        ) from None


def sizes_of(inputs: Mapping[str, Tensor]) -> str:
    """Inputs by name and size, in words."""
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())


def rows_of(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A batch's rows, each a batch of one."""
    count = len(next(iter(inputs.values())))
    return [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(count)]


def enlarged(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    """No dynamic axis of size 1, which the exporters would take for a fixed one."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], axis)
    return tensor


@torch.no_grad()
def in_floats(model: nn.Module) -> None:
    """Frozen weights of 8 or 4 bits as the numbers that they stand for: no format knows ours."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, QuantizedTensor):
                module._parameters[name] = nn.Parameter(parameter.dequantize(), requires_grad=False)
