"""The measuring pass: a plain model is run over a few batches, and the spectra of its layers' inputs, or of
the gradients of their weights, are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import cached, is_parametrized
from torch.overrides import TorchFunctionMode

from lora_lightning.adapters.layer_inputs import Draw, attended, by_groups, patches, recurrent_rows
from lora_lightning.errors import UserError
from lora_lightning.layers.registry import slots_of
from lora_lightning.layers.slot import Slot
from lora_lightning.methods.data_inits import matrices_of
from lora_lightning.methods.moments import Moments, Spectrum, spectrum_of
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.utils.names import named_modules, submodule
from lora_lightning.utils.tables import truncate_list

Step = Callable[
    [Any], Any
]  # what is done with a batch: runs the model, and returns the loss where it is asked for
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # of a convolution
ATTENTION = ("query", "key", "value")


@dataclass(eq=False)
class Seen:
    """One planned layer, and what was seen of its inputs.

    Attributes:
        moments: of its inputs.
    """

    layer: LayerPlan
    slot: Slot
    module: nn.Module
    moments: Moments

    def add(self, rows: Tensor) -> None:
        """Rows (T, columns), or of each group (groups, T, columns)."""
        if rows.numel():
            self.moments.add(rows if rows.dim() == 3 else rows.unsqueeze(0))


@dataclass
class Watch:
    """Who takes note of the inputs of planned layers.

    A weight is known again in the function that multiplies with it, whoever calls that: Swin transformers,
    BEiT and attention read the weights of layers that they never call. What no such function shows (a weight
    that is computed, an attention, an RNN) is seen in the call of its module.
    """

    model: nn.Module
    layers: list[Seen]
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        self.by_weight: dict[int, list[Seen]] = {}
        self.by_module: dict[nn.Module, list[Seen]] = {}
        for one in self.layers:
            self.by_module.setdefault(one.module, []).append(one)
            weight = one.module._parameters.get(one.slot.parameter)
            if weight is not None:
                self.by_weight.setdefault(id(weight), []).append(one)
        holders: dict[int, int] = {}
        for module in named_modules(self.model).values():
            for parameter in module._parameters.values():
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
        self.tied = {key for key in self.by_weight if holders[key] > 1}
        self.calls: list[nn.Module] = []  # planned modules that are being called, the innermost last
        self.shown: list[set[nn.Module]] = []  # for each of these, of which a function has shown the input

    def hooks(self) -> Iterable[Any]:
        """Hooks that see the calls of the modules; each has to be removed."""
        attentions = {
            m: f"{name}.out_proj".lstrip(".")
            for name, m in named_modules(self.model).items()
            if isinstance(m, nn.MultiheadAttention)
        }
        outputs = {one.layer.module: one for one in self.layers}
        for module in {*self.by_module, *(m for m, out in attentions.items() if out in outputs)}:
            yield module.register_forward_pre_hook(self.before, with_kwargs=True)
            out = outputs.get(attentions[module]) if isinstance(module, nn.MultiheadAttention) else None
            yield module.register_forward_hook(partial(self.after, out), with_kwargs=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(module)
        self.shown.append(set())

    @torch.no_grad()
    def after(
        self, out: Seen | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.calls.pop()
        if module in self.shown.pop():
            return
        planned = self.by_module.get(module, [])
        if isinstance(module, nn.MultiheadAttention):
            self._attention(planned, out, module, args, kwargs)
        elif isinstance(module, nn.RNNBase):
            found = recurrent_rows(module, args, kwargs)
            for one in planned:
                if one.slot.parameter in found:
                    one.add(self.draw.of(found[one.slot.parameter]))
        elif isinstance(module, nn.RNNCellBase):
            x, state = (*args, kwargs.get("hx"))[:2] if args else (kwargs["input"], kwargs.get("hx"))
            hidden = state[0] if isinstance(state, tuple) else state
            if hidden is None:
                hidden = x.new_zeros(*x.shape[:-1], module.hidden_size)
            for one in planned:
                one.add(self.draw.of(x if one.slot.parameter == "weight_ih" else hidden))
        else:
            x = args[0] if args else next(iter(kwargs.values()))
            for one in planned:
                self._plain(one, x)

    def _attention(
        self, planned: Sequence[Seen], out: Seen | None, module: nn.MultiheadAttention, args: Any, kwargs: Any
    ) -> None:
        given = dict(zip(ATTENTION, args, strict=False)) | kwargs
        for one in planned:
            part = one.layer.slot.removeprefix("in_proj").strip(".")[:1]  # q, k, v, or none: all three
            read = [given[name] for name in ATTENTION if name.startswith(part)]
            for x in {id(x): x for x in read}.values():
                one.add(self.draw.of(x))
        if out is not None:
            out.add(self.draw.of(attended(module, args, kwargs)))

    def _plain(self, one: Seen, x: Tensor) -> None:
        """The input of a module that computes its weight, or multiplies with it in a way of its own."""
        module: Any = one.module
        if isinstance(module, _ConvTransposeNd):
            self._channels(one, x, len(module.kernel_size))
        elif isinstance(module, _ConvNd):
            options = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
            if module.padding_mode != "zeros":
                x, options["padding"] = (
                    F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode),
                    0,
                )
            self._patches(one, x, options)
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            one.add(self.draw.of(x))

    def _patches(self, one: Seen, x: Tensor, options: dict[str, Any]) -> None:
        found = patches(x, one.layer.shape[2:], options, self.draw)
        one.add(by_groups(found, one.slot.groups, one.moments.columns))

    def _channels(self, one: Seen, x: Tensor, dimensions: int) -> None:
        rows = self.draw.of(x, -1 - dimensions)
        one.add(rows.reshape(len(rows), one.slot.groups, -1).movedim(1, 0))

    @torch.no_grad()
    def function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A function of torch that may multiply with a planned weight."""
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        weight = given.get("weight")
        for one in self.by_weight.get(id(weight), ()):
            inner = self.calls[-1] if self.calls else None
            if id(weight) in self.tied and one.module is not inner:
                continue  # the module that it is tied to, which keeps its weight
            if inner is one.module:
                self.shown[-1].add(inner)
            x = given["input"]
            if function in CONVOLUTIONS:
                defaults = {"stride": 1, "padding": 0, "dilation": 1}
                self._patches(one, x, {name: given.get(name, value) for name, value in defaults.items()})
            elif function in TRANSPOSED:
                self._channels(one, x, len(one.layer.shape) - 2)
            else:
                one.add(self.draw.of(x))


class Functions(TorchFunctionMode):
    """Shows a watch the functions of torch that multiply with a weight."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear or func in CONVOLUTIONS or func in TRANSPOSED:
            self.watch.function(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def input_spectra(
    model: nn.Module, layers: Sequence[LayerPlan], batches: Iterable[Any], step: Step, ranks: dict[str, int]
) -> tuple[dict[str, Spectrum], int]:
    """The spectra of the inputs of planned layers, by their names, and the number of batches.

    Args:
        ranks: the most components that are asked for, by name.

    Raises:
        UserError: no batch came; inputs of some layers were not seen, or are not finite.
    """
    seen = []
    for layer in layers:
        module = submodule(model, layer.module)
        slot = slots_of(layer.module, module)[layer.slot]
        columns = slot.factors(layer.shape, 1)[0]
        size = torch.Size(columns[1:]).numel()
        seen.append(Seen(layer, slot, module, Moments(size, slot.groups, ranks[layer.name])))
    watch = Watch(model, seen)
    hooks: list[Any] = []
    count = 0
    try:
        hooks += watch.hooks()
        for batch in batches:
            with torch.no_grad(), Functions(watch):
                step(batch)
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    _refuse_none(count)
    return _spectra({one.layer.name: one.moments.spectrum for one in seen if one.moments.rows}, layers), count


def gradient_spectra(
    model: nn.Module, layers: Sequence[LayerPlan], batches: Iterable[Any], step: Step
) -> tuple[dict[str, Spectrum], int]:
    """The spectra of the mean gradient of planned layers' weights, by their names, and the number of batches.

    Raises:
        UserError: no batch came, a batch gives no loss, or a gradient is not finite.
    """
    model.requires_grad_(False)
    places = [(submodule(model, layer.module), layer) for layer in layers]
    slots = {layer.name: slots_of(layer.module, module)[layer.slot] for module, layer in places}
    weights: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    count = 0
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(cached())  # what a parametrization computes is one tensor, which has a gradient
        for module, layer in places:
            weights[layer.name] = _leaf(module, slots[layer.name].parameter)
        for batch in batches:
            loss = loss_of(step(batch))
            if not loss.requires_grad:
                raise UserError(
                    "the loss does not depend on any adapted layer: is it computed with gradients?"
                )
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    gradient = gradient.to_dense() if gradient.is_sparse else gradient
                    part = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    sums[name] = sums[name] + part if name in sums else part
            count += 1
    _refuse_none(count)
    ready = {
        name: partial(_gradient_spectrum, slots[name], sums.get(name, torch.zeros_like(weight)) / count)
        for name, weight in weights.items()
    }
    return _spectra(ready, layers), count


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a tensor, a tuple of arguments or a dictionary of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def loss_of(result: Any) -> Tensor:
    """The loss in what a step returns, a tensor or a mapping that has "loss".

    Raises:
        UserError: there is none.
    """
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UserError("a step returns no loss, whose gradient is asked for")
    return loss.sum()


def _gradient_spectrum(slot: Slot, gradient: Tensor) -> Spectrum:
    return spectrum_of(matrices_of(slot, gradient))


def _leaf(module: nn.Module, name: str) -> Tensor:
    """The weight that the module multiplies with, with a gradient."""
    if is_parametrized(module, name):
        parametrization: Any = cast(nn.ModuleDict, module.parametrizations)[name]
        parametrization.requires_grad_(True)
        weight: Tensor = getattr(module, name)
        return weight
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter.requires_grad_(True)


def _refuse_none(count: int) -> None:
    if not count:
        raise UserError("the data give no batch: give at least one")


def _spectra(ready: Mapping[str, Callable[[], Spectrum]], layers: Sequence[LayerPlan]) -> dict[str, Spectrum]:
    """What was gathered, of every layer; all that is missing or wrong in one message.

    Raises:
        UserError: it is not of every layer, or not finite.
    """
    found: dict[str, Spectrum] = {}
    problems = []
    if unseen := [layer.name for layer in layers if layer.name not in ready]:
        problems.append(
            f"nothing shows the inputs of {truncate_list(unseen)}: no batch reaches them, or they multiply "
            "in a way of their own"
        )
    for name, make in ready.items():
        try:
            found[name] = make()
        except UserError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError("; ".join(problems))
    return found
