"""The products that a convolution with factors A and B is made of: to the few channels of A, from these by
B, and their gradients. 1×1 kernels, and on the CPU others with stride 1, take matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import products

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Step(NamedTuple):
    """How a convolution is computed: its geometry, s, the form, and the dropout of the branch's input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    scaling: float
    form: str = ""
    dropout: float = 0.0


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, step: Step, groups: int = 0) -> Tensor:
    """The plain convolution."""
    convolution = CONVOLUTIONS[len(step.stride)]
    return convolution(x, weight, bias, step.stride, step.padding, step.dilation, groups or step.groups)


def gradients(
    dY: Tensor, x: Tensor, weight: Tensor, step: Step, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of a convolution by its input and weight."""
    dX = None
    if need_x and is_pointwise(weight, step):
        dX, need_x = unsample(products.apply(weight.flatten(1).t(), dY), x, step), False
    if need_x or need_weight:
        by_input, dW, _ = torch.ops.aten.convolution_backward(
            dY, x, weight, None, step.stride, step.padding, step.dilation, False,
            [0] * len(step.stride), step.groups, [need_x, need_weight, False],
        )  # fmt: skip
        return by_input if need_x else dX, dW
    return dX, None


def reduce(x: Tensor, A: Tensor, step: Step) -> Tensor:
    """conv(x, A): (n, groups·r, *out)."""
    if is_pointwise(A, step):
        return products.apply(A.flatten(1), sample(x, step))
    if is_tapwise(x, A, step):
        return products.convolve(x, A, step.padding, step.dilation)
    return convolve(x, A, None, step)


def reduce_gradients(
    G: Tensor, x: Tensor, A: Tensor, step: Step, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of `_reduce` by x and A."""
    if is_pointwise(A, step):
        dA = products.outer(G, x).view(A.shape)
        return (products.apply(A.flatten(1).t(), G) if need_x else None), dA
    if is_tapwise(x, A, step):
        shifted = products.spread(G, x, A.shape[2:], step.padding, step.dilation)
        dA = products.untaps(products.outer(shifted, x), A.shape)
        return (products.apply(products.taps(A).t(), shifted) if need_x else None), dA
    return gradients(G, x, A, step, need_x, True)


def add_expanded(y: Tensor, h: Tensor, B: Tensor, step: Step) -> Tensor:
    """y + B·h, in place where it can be."""
    return products.add_applied(y, B, h) if step.groups == 1 else y.add_(expand(h, B, step))


def expand(h: Tensor, B: Tensor, step: Step) -> Tensor:
    """B·h, group by group: a 1×1 convolution."""
    convolution = CONVOLUTIONS[len(step.stride)]
    return convolution(h, B.view(*B.shape, *[1] * len(step.stride)), groups=step.groups)


def expand_transposed(dY: Tensor, B: Tensor, step: Step) -> Tensor:
    """s·Bᵀ·dY, group by group."""
    turned = (step.scaling * B).view(step.groups, -1, B.shape[1]).mT  # (groups, r, out / groups)
    if step.groups == 1:
        return products.apply(turned[0].contiguous(), dY)
    return expand(dY, turned.reshape(-1, turned.shape[2]), step)


def B_gradient(dY: Tensor, h: Tensor, step: Step) -> Tensor:
    """(out, r)."""
    if step.groups == 1:
        return step.scaling * products.outer(h, dY).t()
    left, right = (t.flatten(2).unflatten(1, (step.groups, -1)) for t in (dY, h))
    return step.scaling * torch.matmul(left, right.mT).sum(0).flatten(0, 1)


def is_pointwise(weight: Tensor, step: Step) -> bool:
    """Whether the convolution is one matrix product at each of the sampled positions."""
    return step.groups == 1 and weight[0, 0].numel() == 1 and not any(step.padding)


def is_tapwise(x: Tensor, A: Tensor, step: Step) -> bool:
    """Whether `products` are faster: on the CPU, unless they would make far more channels than x has."""
    channels = A.shape[0] * A[0, 0].numel()
    return (
        x.device.type == "cpu" and step.groups == 1 and set(step.stride) == {1} and channels <= 2 * x.shape[1]
    )


def sample(x: Tensor, step: Step) -> Tensor:
    """x at the positions that a 1×1 kernel with a stride reads, packed."""
    if set(step.stride) == {1}:
        return x
    return x[_positions(step)].contiguous(memory_format=memory_format(x))


def unsample(part: Tensor, x: Tensor, step: Step) -> Tensor:
    """`_sampled` undone: zeros elsewhere."""
    if set(step.stride) == {1}:
        return part
    whole = torch.zeros_like(x)
    whole[_positions(step)] = part
    return whole


def _positions(step: Step) -> tuple[slice, ...]:
    return slice(None), slice(None), *(slice(None, None, s) for s in step.stride)


def scale(step: Step) -> float:
    return 0.0 if step.dropout == 1 else 1 / (1 - step.dropout)


def per_channel(values: Tensor, step: Step) -> Tensor:
    return values.view(-1, *[1] * len(step.stride))


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where x is so and not also contiguous."""
    for dimensions, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dimensions and not x.is_contiguous() and x.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


def dense_in(format: torch.memory_format, *tensors: Tensor) -> list[Tensor]:
    return [t.contiguous(memory_format=format) for t in tensors]
