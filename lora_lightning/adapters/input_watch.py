"""Who takes note of the inputs of planned layers while a plain model runs: by the functions of torch that
multiply with their weights, or by the calls of their modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from lora_lightning.adapters.layer_inputs import Draw, attended, by_groups, patches, recurrent_rows
from lora_lightning.layers.slot import Slot
from lora_lightning.methods.moments import Moments
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.utils.names import named_modules

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
