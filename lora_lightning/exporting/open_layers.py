"""Layers that add an update given in each call, and the network of such layers behind plain arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.exporting.subject import Flat
from lora_lightning.utils.names import submodule

Factors = tuple[Tensor, Tensor]  # of each group, (groups, m, r) and (groups, r, k), the scaling in the first


@dataclass
class Held:
    """The factors of the call in progress, by layer: no attributes of modules, which a trace would refuse."""

    factors: dict[str, Factors] = field(default_factory=dict)


class OpenLinear(nn.Linear):
    """x·Wᵀ + b + x·A·B with A (in, r) and B (r, out) of the call."""

    def forward(self, input: Tensor) -> Tensor:
        A, B = self.__dict__["held"].factors[self.__dict__["path"]]
        return super().forward(input) + input @ A @ B


class _OpenConv(nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        A, B = self.__dict__["held"].factors[self.__dict__["path"]]
        inner = cast(Any, self)._conv_forward(input, A, None)
        back = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return cast(Tensor, super().forward(input)) + back(inner, B)  # of Conv1d to 3d


class OpenConv1d(_OpenConv, nn.Conv1d):
    """A convolution + its update, a convolution by A (r, in, k) and one by B (out, r, 1)."""


class OpenConv2d(_OpenConv, nn.Conv2d):
    """The same of two dimensions."""


class OpenConv3d(_OpenConv, nn.Conv3d):
    """The same of three."""


OPEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: OpenLinear,
    nn.Conv1d: OpenConv1d,
    nn.Conv2d: OpenConv2d,
    nn.Conv3d: OpenConv3d,
}


class Open(nn.Module):
    """A network behind plain arguments: its inputs, then those of an adapter.

    Args:
        flat: the network; where one of its layers is called, its class is one of `OPEN`.
        own: how many inputs the network has.
        branches: layers that add their update by a branch.
        weights: parameters to which their update is added, in shape (groups, …).
        whole: tensors that are given whole.
    """

    def __init__(
        self, flat: Flat, own: int, branches: list[str], weights: list[str], whole: list[str], held: Held
    ) -> None:
        super().__init__()
        self.flat, self.own = flat, own
        self.branches, self.weights, self.whole = branches, weights, whole
        self.__dict__["held"] = held

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given, more = inputs[: self.own], list(inputs[self.own :])
        held: Held = self.__dict__["held"]
        held.factors = {path: (more.pop(0), more.pop(0)) for path in self.branches}
        values = {}
        for name in self.weights:
            left, right = more.pop(0), more.pop(0)
            weight = tensor_of(self.flat.network, name)
            values[f"network.{name}"] = weight + (left @ right).reshape(weight.shape)
        values |= {f"network.{name}": more.pop(0) for name in self.whole}
        try:
            return cast("tuple[Tensor, ...]", torch.func.functional_call(self.flat, values, given))
        finally:
            held.factors = {}


def tensor_of(network: nn.Module, name: str) -> Tensor:
    """A parameter or buffer, by its name."""
    path, _, leaf = name.rpartition(".")
    module = submodule(network, path)
    return cast(Tensor, {**module._buffers, **module._parameters}[leaf])
