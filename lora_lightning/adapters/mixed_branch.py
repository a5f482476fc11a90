"""Batched low-rank branches: one product with the A and one with the B of each sample's own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.adapters.mixed_samples import MixedSamples
from lora_lightning.adapters.stacks import Stack, stacked
from lora_lightning.kernels.common import product_dtype, without_autocast
from lora_lightning.kernels.conv_products import CONVOLUTIONS
from lora_lightning.kernels.dora import scaled_change
from lora_lightning.layers.branch import BranchLayer
from lora_lightning.layers.conv import TRANSPOSED, LoRAConv, LoRAConvTranspose
from lora_lightning.layers.embedding import LoRAEmbedding
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.linear import LoRALinear
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.swap import class_of
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.layers.views import Standing, View, seen


class MixedBranch:
    """The forward of a layer with a low-rank branch for samples of several adapters.

    Args:
        path: the layer's name in the model.
        slots: the updates of each adapter in `samples.distinct`, None where it has none there.
        values: of the layer's own tensors, by name, where all samples have another one than stands there.
        biases: gives the bias of each sample, (n, out), where adapters have their own.
    """

    def __init__(
        self,
        layer: LoRALayer,
        path: str,
        samples: MixedSamples,
        slots: Mapping[Slot, Sequence[LowRankUpdate | None]],
        values: Mapping[str, Tensor | Standing | None],
        biases: Callable[[], Tensor] | None,
    ) -> None:
        self.layer, self.samples, self.biases = layer, samples, biases
        self.forward = class_of(layer).forward
        self.base_view = View(layer.lora_choice, "", values=values)
        no_bias = {**values, f"{path}.bias".lstrip("."): None}
        self.view_without_bias = View(layer.lora_choice, "", values=no_bias)
        self.slots = slots
        self._stacks: list[Stack] = []
        self._versions: tuple[Any, ...] | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = self.samples.dim_of(x, self.layer)
        return self.along(dim, x, *args, **kwargs)

    def along(self, dim: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, of an input with its samples along `dim`."""
        layer, n = self.layer, len(self.samples)
        stacks = self.stacks(x)
        y = self._base(x, *args, **kwargs).movedim(dim, 0).unflatten(0, (n, -1))
        x = x.movedim(dim, 0).unflatten(0, (n, -1))  # (n, k, ...): k inputs of each sample
        base, scaled = y, any(s.factors is not None for s in stacks)
        if scaled and self.biases is None:
            with seen(self.base_view):
                own = getattr(layer, "bias", None)
            if own is not None:
                base = y - self._per_feature(own.to(y.dtype)[None], y)  # the product, which DoRA scales
        branch = BRANCHES[layer.mixin_class]
        for stack in stacks:
            if branch is _linear and not scaled and stack.slot.out_range is None:
                y = _add_linear(y, self._dropped(x, stack), stack)
                continue
            change = branch(layer, self._dropped(x, stack), stack, self.samples, *args, **kwargs)
            if stack.factors is not None:
                mixed = cast(BranchLayer, layer)
                product = mixed._part(base, stack)  # type: ignore[arg-type]  # it has a slot
                change = scaled_change(self._per_feature(stack.factors, y), product, change)
            y = y + self._placed(change.to(y.dtype), stack, y)
        if self.biases is not None:
            y = y + self._per_feature(self.biases().to(y.dtype), y)
        return y.flatten(0, 1).movedim(0, dim)

    def stacks(self, x: Tensor) -> list[Stack]:
        """Made anew where gradients flow, or a value or the dtype of the products has changed since."""
        updates = [u for us in self.slots.values() for u in us if u is not None]
        tensors = [p for u in updates for p in u._parameters.values() if p is not None]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in tensors)
        fixed = not trains and not any(p.is_inference() for p in tensors)
        dtype = product_dtype(x) if x.is_floating_point() else None
        versions = (dtype, *[(p._version, p.data_ptr()) for p in tensors]) if fixed else None
        if versions is None or versions != self._versions:
            with seen(self.base_view):
                stacks = [
                    stacked(self.layer, updates, self.samples, dtype) for updates in self.slots.values()
                ]
            self._stacks, self._versions = stacks, versions
            if versions is None:
                self._stacks = []
                return stacks
        return self._stacks

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """f(x, W), with the bias where it is the same for all samples."""
        without = self.layer._parameters.get("bias") is not None and self.biases is not None
        with seen(self.view_without_bias if without else self.base_view):
            return cast(Tensor, self.forward(self.layer, x, *args, **kwargs))

    def _dropped(self, x: Tensor, stack: Stack) -> Tensor:
        """Dropout of each sample's own adapter."""
        drops = [0.0 if u is None else u.drops for u in stack.updates]
        if not any(drops):
            return x
        keep = torch.tensor([1 - p for p in drops], device=x.device)[self.samples.index(x.device)]
        keep = keep.view(-1, *[1] * (x.dim() - 1))
        return x * (torch.bernoulli(keep.expand(x.shape)) / keep).to(x.dtype)

    def _per_feature(self, values: Tensor, y: Tensor) -> Tensor:
        """(n or 1, features) against y, (n, k, ...)."""
        shape = [values.shape[0], *[1] * (y.dim() - 1)]
        shape[getattr(self.layer, "channel_dim", -1)] = values.shape[1]
        return values.view(shape)

    def _placed(self, change: Tensor, stack: Stack, y: Tensor) -> Tensor:
        if stack.slot.out_range is None:
            return change
        return cast(BranchLayer, self.layer)._placed(change, stack, y)  # type: ignore[arg-type]  # it has a slot


def _linear(layer: LoRALayer, x: Tensor, stack: Stack, samples: MixedSamples) -> Tensor:
    h = torch.bmm(x.flatten(1, -2), stack.A.squeeze(1).mT.to(x.dtype))  # (n, tokens, in) -> (n, tokens, R)
    return torch.bmm(h, stack.B.to(h.dtype)).unflatten(1, x.shape[1:-1])


def _add_linear(y: Tensor, x: Tensor, stack: Stack) -> Tensor:
    """y plus the branch, without a tensor of y's size between; y is this layer's own and may be written."""
    h = torch.bmm(x.flatten(1, -2), stack.A.squeeze(1).mT.to(x.dtype))
    add = torch.baddbmm if y.requires_grad or h.requires_grad else Tensor.baddbmm_
    return add(y.flatten(1, -2), h, stack.B.to(h.dtype)).unflatten(1, y.shape[1:-1])


def _embedding(layer: LoRALayer, i: Tensor, stack: Stack, samples: MixedSamples) -> Tensor:
    i = i.flatten(0, 1)
    parts = []
    for j, update in enumerate(stack.updates):
        mine = samples.take(i, 0, j)
        if update is None:
            parts.append(stack.B.new_zeros(*mine.shape, stack.rank))
        else:
            h = cast(LoRAEmbedding, layer)._look_up(mine, update.factors()[0].t())
            parts.append(F.pad(h, [0, stack.rank - update.total_rank]))
    h = samples.join(parts, 0).unflatten(0, (len(samples), -1))  # (n, k, ..., R)
    with without_autocast(h.device.type):  # as in LoRAEmbedding
        return torch.bmm(h.flatten(1, -2), stack.B.squeeze(1)).unflatten(1, h.shape[1:-1])


def _conv(layer: LoRALayer, x: Tensor, stack: Stack, samples: MixedSamples) -> Tensor:
    conv = cast(Any, layer)
    n, k = x.shape[:2]
    groups, kernel = stack.slot.groups, conv.kernel_size
    A, B = stack.A.to(x.dtype), stack.B.to(x.dtype)
    if groups != conv.groups:  # depthwise: the update is as small as the weight
        weight = torch.bmm(B.squeeze(1), A.squeeze(1)).reshape(n * conv.out_channels, -1, *kernel)
        return _by_row(_convolve(conv, _side_by_side(x), weight, n * conv.groups), n)
    if set(kernel) == {1} and not _padded(conv):
        steps = tuple(slice(None, None, s) for s in conv.stride)
        x = x[(slice(None), slice(None), slice(None), *steps)]
        size = x.shape[3:]
        h = torch.bmm(A.flatten(0, 1), _by_group(x, groups))  # (n·groups, R, k·pixels)
    else:
        weight = A.reshape(n * groups * stack.rank, -1, *kernel)
        y = _convolve(conv, _side_by_side(x), weight, n * groups)  # (k, n·groups·R, *size)
        size = y.shape[2:]
        h = _by_group(_by_row(y, n), groups)
    return _ungrouped(torch.bmm(B.flatten(0, 1), h), n, k, size)


def _conv_transpose(
    layer: LoRALayer, x: Tensor, stack: Stack, samples: MixedSamples, output_size: list[int] | None = None
) -> Tensor:
    conv = cast(Any, layer)
    n, k = x.shape[:2]
    groups, size = conv.groups, x.shape[3:]
    A, B = stack.A.to(x.dtype), stack.B.to(x.dtype)
    h = torch.bmm(A.flatten(0, 1), _by_group(x, groups))  # (n·groups, R, k·pixels)
    h = _side_by_side(_ungrouped(h, n, k, size))  # (k, n·groups·R, *size)
    weight = B.reshape(n * groups * stack.rank, -1, *conv.kernel_size)
    padding = conv._output_padding(
        x.flatten(0, 1), output_size, conv.stride, conv.padding, conv.kernel_size, len(size), conv.dilation
    )
    transpose = TRANSPOSED[len(size)]
    y = transpose(h, weight, None, conv.stride, conv.padding, padding, n * groups, conv.dilation)
    return _by_row(y, n)


def _padded(conv: Any) -> bool:
    return conv.padding not in ("same", "valid") and any(conv.padding)


def _convolve(conv: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The layer's own convolution, its padding mode included, with another weight and more groups."""
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    convolve = CONVOLUTIONS[len(conv.kernel_size)]
    return convolve(x, weight, None, conv.stride, padding, conv.dilation, groups)


def _side_by_side(x: Tensor) -> Tensor:
    """(n, k, channels, *size) -> (k, n·channels, *size): the samples as groups of channels."""
    return x.transpose(0, 1).flatten(1, 2)


def _by_row(y: Tensor, n: int) -> Tensor:
    """The inverse of `_side_by_side`."""
    return y.unflatten(1, (n, -1)).transpose(0, 1)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(n, k, channels, *size) -> (n·groups, channels / groups, k·pixels)."""
    n = len(x)
    x = x.flatten(3).unflatten(2, (groups, -1))  # (n, k, groups, channels, pixels)
    return x.permute(0, 2, 3, 1, 4).reshape(n * groups, x.shape[3], -1)


def _ungrouped(y: Tensor, n: int, k: int, size: torch.Size) -> Tensor:
    """The inverse of `_by_group`: (n·groups, channels / groups, k·pixels) -> (n, k, channels, *size)."""
    y = y.view(n, -1, y.shape[1], k, *size)  # (n, groups, channels, k, *size)
    return y.movedim(3, 1).flatten(2, 3)


BRANCHES: dict[type, Callable[..., Tensor]] = {
    LoRALinear: _linear,
    LoRAConv: _conv,
    LoRAConvTranspose: _conv_transpose,
    LoRAEmbedding: _embedding,
}


def has_mixed_branch(layer: LoRALayer) -> bool:
    """Whether the layer's family has a batched branch; the others are called once for each adapter."""
    return layer.mixin_class in BRANCHES and not getattr(layer, "scale_grad_by_freq", False)
