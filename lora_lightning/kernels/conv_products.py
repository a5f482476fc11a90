"""The products that a convolution with factors A and B is made of: to the few channels of A, from these by
B, and their gradients. 1×1 kernels, and on the CPU others with stride 1, take matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import products

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvSpec(NamedTuple):
    """How a convolution is computed: its geometry, s, the form, the dropout of the branch's input, whether
    the rules of a CPU hold, and constants (out,) that the rows of W' are multiplied by, which a branch has in
    its W and B."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    scaling: float
    form: str = ""
    dropout: float = 0.0
    cpu: bool = True
    rows: Tensor | None = None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, groups: int = 0) -> Tensor:
    """The plain convolution."""
    convolution = CONVOLUTIONS[len(spec.stride)]
    return convolution(x, weight, bias, spec.stride, spec.padding, spec.dilation, groups or spec.groups)


def convolve_merged(x: Tensor, W: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """The convolution with a W' that was given. cuDNN's adds a bias in a pass of its own, a matrix product in
    passing: so where a norm gave it, and no bits of the base layer's are to be kept, 1×1 kernels of channels
    last take the latter."""
    product = spec.rows is not None and is_pointwise(W, spec) and set(spec.stride) == {1}
    if not product or bias is None or memory_format(x) == torch.contiguous_format:
        return convolve(x, W, bias, spec)
    rows = x.movedim(1, -1)  # a view whose rows are the positions
    return torch.addmm(bias, rows.flatten(0, -2), W.flatten(1).t()).view(*rows.shape[:-1], -1).movedim(-1, 1)


def gradients(
    dY: Tensor,
    x: Tensor,
    weight: Tensor,
    spec: ConvSpec,
    need_x: bool,
    need_weight: bool,
    need_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of a convolution by its input, weight and bias: in one call, but on a CPU by products where
    these are faster."""
    dX = None
    if need_x and spec.cpu and is_pointwise(weight, spec):
        dX, need_x = unsample(products.apply(weight.flatten(1).t(), dY), x, spec), False
    if not (need_x or need_weight or need_bias):
        return dX, None, None
    by_input, dW, by_bias = torch.ops.aten.convolution_backward(
        dY, x, weight, [dY.shape[1]], spec.stride, spec.padding, spec.dilation, False,
        [0] * len(spec.stride), spec.groups, [need_x, need_weight, need_bias],
    )  # fmt: skip
    return by_input if need_x else dX, dW if need_weight else None, by_bias if need_bias else None


def bias_gradient(dY: Tensor, needed: bool) -> Tensor | None:
    return dY.sum([d for d in range(dY.dim()) if d != 1]) if needed else None


def reduce(x: Tensor, A: Tensor, spec: ConvSpec) -> Tensor:
    """conv(x, A): (n, groups·r, *out)."""
    if spec.cpu and is_pointwise(A, spec):
        return products.apply(A.flatten(1), sample(x, spec))
    if is_tapwise(x, A, spec):
        return products.convolve(x, A, spec.padding, spec.dilation)
    return convolve(x, A, None, spec)


def reduce_gradients(
    G: Tensor, x: Tensor, A: Tensor, spec: ConvSpec, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of `reduce` by x and A."""
    if spec.cpu and is_pointwise(A, spec):
        dA = products.outer(G, x).view(A.shape)
        return (products.apply(A.flatten(1).t(), G) if need_x else None), dA
    if is_tapwise(x, A, spec):
        shifted = products.spread(G, x, A.shape[2:], spec.padding, spec.dilation)
        dA = products.untaps(products.outer(shifted, x), A.shape)
        return (products.apply(products.taps(A).t(), shifted) if need_x else None), dA
    return gradients(G, x, A, spec, need_x, True)[:2]


def add_expanded(y: Tensor, h: Tensor, B: Tensor, spec: ConvSpec) -> Tensor:
    """y + B·h, in place where it can be."""
    return products.add_applied(y, B, h) if spec.groups == 1 else y.add_(expand(h, B, spec))


def expand(h: Tensor, B: Tensor, spec: ConvSpec) -> Tensor:
    """B·h, group by group: a 1×1 convolution."""
    convolution = CONVOLUTIONS[len(spec.stride)]
    return convolution(h, B.view(*B.shape, *[1] * len(spec.stride)), groups=spec.groups)


def expand_transposed(dY: Tensor, B: Tensor, spec: ConvSpec) -> Tensor:
    """s·Bᵀ·dY, group by group, for a B of any dtype."""
    by_group = B.view(spec.groups, -1, B.shape[1]).mT  # (groups, r, out / groups)
    turned = torch.mul(by_group, spec.scaling, out=dY.new_empty(by_group.shape))
    if spec.groups == 1:
        return products.apply(turned[0], dY)
    return expand(dY, turned.flatten(0, 1), spec)


def B_gradient(dY: Tensor, h: Tensor, B: Tensor, spec: ConvSpec) -> Tensor:
    """Of B's shape and dtype."""
    if not spec.cpu:
        return torch.mul(up_gradient(dY, h, B, spec), spec.scaling, out=torch.empty_like(B))
    if spec.groups == 1:
        return (spec.scaling * products.outer(h, dY).t()).to(B.dtype)
    left, right = (t.flatten(2).unflatten(1, (spec.groups, -1)) for t in (dY, h))
    return (spec.scaling * torch.matmul(left, right.mT).sum(0).flatten(0, 1)).to(B.dtype)


def up_gradient(dY: Tensor, h: Tensor, B: Tensor, spec: ConvSpec) -> Tensor:
    """That of `expand` by B, in dY's dtype: of a 1×1 kernel."""
    ones = [1] * len(spec.stride)
    _, dB, _ = torch.ops.aten.convolution_backward(
        dY, h, h.new_empty(*B.shape, *ones), None, ones, [0], ones, False, [0], spec.groups,
        [False, True, False],
    )  # fmt: skip
    return dB.view(B.shape)


def is_pointwise(weight: Tensor, spec: ConvSpec) -> bool:
    """Whether the convolution is one matrix product at each of the sampled positions."""
    return spec.groups == 1 and weight[0, 0].numel() == 1 and not any(spec.padding)


def is_tapwise(x: Tensor, A: Tensor, spec: ConvSpec) -> bool:
    """Whether `products` are faster: on the CPU, unless they would make far more channels than x has."""
    channels = A.shape[0] * A[0, 0].numel()
    return spec.cpu and spec.groups == 1 and set(spec.stride) == {1} and channels <= 2 * x.shape[1]


def sample(x: Tensor, spec: ConvSpec) -> Tensor:
    """x at the positions that a 1×1 kernel with a stride reads, packed."""
    if set(spec.stride) == {1}:
        return x
    return x[_positions(spec)].contiguous(memory_format=memory_format(x))


def unsample(part: Tensor, x: Tensor, spec: ConvSpec) -> Tensor:
    """`sampled` undone: zeros elsewhere."""
    if set(spec.stride) == {1}:
        return part
    whole = torch.zeros_like(x)
    whole[_positions(spec)] = part
    return whole


def _positions(spec: ConvSpec) -> tuple[slice, ...]:
    return slice(None), slice(None), *(slice(None, None, s) for s in spec.stride)


def per_channel(values: Tensor, spec: ConvSpec) -> Tensor:
    return values.view(-1, *[1] * len(spec.stride))


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where x is so and not also contiguous."""
    for dimensions, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dimensions and not x.is_contiguous() and x.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


def dense_in(format: torch.memory_format, *tensors: Tensor) -> list[Tensor]:
    return [t.contiguous(memory_format=format) for t in tensors]
