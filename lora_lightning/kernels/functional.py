"""The layers as functions of their tensors: fast autograd functions with a plain reference beside each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import common, compiled, linear_dropped, linear_merged, sources
from lora_lightning.kernels.common import product_dtype, without_autocast
from lora_lightning.kernels.conv import FORMS, PLAIN_FORMS
from lora_lightning.kernels.conv_form import choose_form
from lora_lightning.kernels.conv_products import CONVOLUTIONS, ConvSpec
from lora_lightning.kernels.conv_reference import times_rows
from lora_lightning.kernels.dropout import keep_mask
from lora_lightning.kernels.fused.inputs import input_of
from lora_lightning.kernels.fused.linear import fused_linear, suits
from lora_lightning.kernels.fused.linear_dora import FusedDoRAFunction
from lora_lightning.kernels.linear import LoRALinearFunction, forward
from lora_lightning.kernels.linear_dropped import DroppedLinearFunction
from lora_lightning.kernels.linear_form import LinearSpec, dense, linear_spec, plain
from lora_lightning.kernels.linear_merged import MergedLinearFunction
from lora_lightning.kernels.merge import Factored, Merged, merge
from lora_lightning.kernels.merge_whole import FactoredKernel, merge_whole
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.kernels.sources import source_of
from lora_lightning.kernels.together import Member


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    magnitude: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
    merged: bool | None = None,
    member: Member | None = None,
) -> Tensor:
    """y = x·(W + s·B·A)ᵀ + b, for a frozen W (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    The gradients of A and B are made from products with r columns, never from a gradient of W's shape;
    x of 1 MiB and more is not kept for the backward where it can be made again from what the layer norm,
    GELU or SiLU before it saved anyway. Works under autocast, where A and B stay in float32 and W is cast
    in passing.

    Args:
        x: (..., d_in).
        weight: W, (d_out, d_in). Where it requires a gradient the reference is taken. A QuantizedTensor
            is made floats in the forward and again in the backward, which keeps its codes alone.
        bias: (d_out,) or None; it may train.
        A: (r, d_in).
        B: (d_out, r).
        scaling: s.
        magnitude: DoRA's m, (d_out,): rows of W + s·B·A are scaled to these norms, which are held
            constant in the backward (Liu et al. 2024, arXiv 2402.09353, equation 5 and section 4.3).
        dropout: probability of dropping an entry of x on its way to A.
        implementation: "auto"; "keep_inputs" saves x always; "reference" is plain autograd; "fused" takes
            `kernels.fused`, and the way of "auto" where `kernels.fused.linear.suits` says no. Compilers,
            function transforms, forward mode and tensor subclasses take the reference by themselves.
        merged: whether to form W + s·B·A or to add a branch; None decides by the shapes
            (`kernels.linear_form.linear_spec`). Without effect with dropout, which needs a branch, and with
            DoRA, which forms the sum for its norms.
        member: the layer, of a model whose merged weights are formed together; None forms this one's alone.

    Returns:
        (..., d_out), for B = 0 and dropout or not the very bits of `F.linear(x, weight, bias)`.
    """
    if implementation == "fused":
        if merged is None and suits(x, weight, bias, A, B, magnitude, dropout):
            if magnitude is not None:
                return _fused_dora(x, Factored(weight, A, B, magnitude), bias, scaling, member)
            return fused_linear(x, weight, bias, A, B, scaling, dropout)
        implementation = "auto"
    spec = linear_spec(x, weight, bias, A, B, scaling, magnitude, dropout, implementation, merged)
    if spec.form == "dense":
        return dense(x, weight, bias, A, B, scaling)
    if spec.form == "plain":
        return plain(x, weight, bias, A, B, magnitude, scaling, F.dropout(x, dropout) if dropout else x)
    if spec.form in ("merged", "dropped"):
        return _merged_linear(x, Factored(weight, A, B, magnitude), bias, spec, member)
    if spec.form == "compiled":
        return compiled.linear(x, weight, bias, A, B, magnitude, scaling, spec.dtype, spec.backward)
    mask = keep_mask(x, dropout) if dropout else None
    if not torch.is_grad_enabled():
        return forward(x, weight, bias, A, B, magnitude, mask, spec)[0]
    if type(weight) is QuantizedTensor:
        weight = weight.detach()  # another object: a parameter that the graph holds cannot be moved
    source = source_of(x) if spec.recompute else None
    y: Tensor = LoRALinearFunction.apply(x, weight, bias, A, B, magnitude, mask, spec, source)
    return y


def _fused_dora(
    x: Tensor, given: Factored, bias: Tensor | None, scaling: float, member: Member | None
) -> Tensor:
    """The form "fused" of `lora_linear` with DoRA."""
    spec = LinearSpec("fused", scaling, dtype=product_dtype(x))
    merged = _formed(given, spec, member)
    if not torch.is_grad_enabled():
        return linear_merged.forward(x, bias, merged, spec)
    y: Tensor = FusedDoRAFunction.apply(x, given.weight, bias, *given[1:], merged, spec, input_of(x), member)
    return y


def _formed(given: Factored, spec: LinearSpec, member: Member | None, added: bool = True) -> Merged:
    """W' of a layer, with those of others where it is of a model."""
    if member is None or type(given.weight) is QuantizedTensor:
        return merge([given], spec.scaling, spec.dtype, added)[0]
    merged: Merged = member.together.take(member, given, spec.scaling, spec.dtype, added)
    return merged


def _merged_linear(
    x: Tensor, given: Factored, bias: Tensor | None, spec: LinearSpec, member: Member | None
) -> Tensor:
    """The forms "merged" and "dropped" of `lora_linear`."""
    weight, A, B, magnitude = given
    added, quantized = spec.form == "merged", type(weight) is QuantizedTensor
    merged = _formed(given, spec, member, added)
    if not torch.is_grad_enabled():
        forward = linear_merged.forward if added else lambda *args: linear_dropped.forward(*args)[0]
        return forward(x, bias, merged, spec)
    weight = weight.detach() if quantized else weight
    source = source_of(x) if spec.recompute or not added else None
    more = spec, source, member
    if added:
        y: Tensor = MergedLinearFunction.apply(x, weight, bias, A, B, magnitude, merged, *more)
    else:
        y = DroppedLinearFunction.apply(x, weight, bias, A, B, merged, *more)
    return y


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    magnitude: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
    rows: Tensor | None = None,
    member: Member | None = None,
) -> Tensor:
    """conv(x, W) + bias + s·B·conv(x, A) of 1, 2 or 3 dimensions, as torch.nn.functional.conv2d
    (Hu et al. 2021, arXiv 2106.09685, section 4.1, with W flattened to out × in·kernel).

    Args:
        x: (batch, in, *size), or without the batch.
        weight: W (out, in / groups, *kernel), frozen: it gets no gradient from the fast path.
        A: (groups·r, in / groups, *kernel), group by group; or (r, in / groups, *kernel), with factors
            across the groups, as of a depthwise convolution.
        B: (out, r).
        scaling: s.
        padding: also "valid" or "same".
        magnitude: DoRA's m (out,): the rows of W + s·B·A are scaled to it (arXiv 2402.09353, equation 5).
        dropout: probability of dropping an entry of the branch's input.
        implementation: as of `lora_linear`; "fused" is "auto" here.
        rows: (out,), constants by which the rows of W + s·B·A are multiplied at last, but not the bias: of a
            norm behind, that is folded into it.
        member: as of `lora_linear`.

    Returns:
        (batch, out, *out size), of x's dtype; under autocast of its dtype.
    """
    dimensions = weight.dim() - 2
    implementation = "auto" if implementation == "fused" else implementation
    if x.dim() == dimensions + 1:
        return lora_conv(
            x[None], weight, bias, A, B, scaling, stride=stride, padding=padding, dilation=dilation,
            groups=groups, magnitude=magnitude, dropout=dropout, implementation=implementation, rows=rows,
            member=member,
        )[0]  # fmt: skip
    stride = stride if isinstance(stride, tuple) else _each(stride, dimensions)
    dilation = dilation if isinstance(dilation, tuple) else _each(dilation, dimensions)
    if isinstance(padding, str):
        x, padding = _padded(x, padding, weight.shape[2:], dilation)
    elif not isinstance(padding, tuple):
        padding = _each(padding, dimensions)
    device, dtype = x.device.type, x.dtype
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if x.dim() != weight.dim() or (dtype != weight.dtype and not autocast):
        CONVOLUTIONS[dimensions](x, weight, bias, stride, padding, dilation, groups)  # refuses them
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    cpu = common.on_cpu(x.device)
    form = choose_form(x, weight, bias, A, B, magnitude, stride, groups, dropout, dtype, implementation, cpu)
    spec = ConvSpec(stride, padding, dilation, groups, scaling, form, dropout, cpu)
    recompute = form not in PLAIN_FORMS and implementation == "auto" and x.nbytes >= sources.LEAST
    source = source_of(x) if recompute else None
    whole = together = None
    if not cpu and form in ("dense", "merged"):
        together = None if member is None else member.together
        kernel = FactoredKernel(weight, A, B, magnitude, rows)
        if member is None or together is None:
            (whole,) = merge_whole([kernel], scaling, dtype)
        else:
            whole = together.take(member, kernel, scaling, dtype)
    if rows is not None and form in ("branch", "dropped", "summed"):
        with without_autocast(device):
            weight, B, magnitude = times_rows(rows, weight, B, magnitude)
    elif rows is not None:
        spec = spec._replace(rows=rows)
    given = x.to(dtype), weight, None if bias is None else bias.to(dtype), A, B, magnitude, spec
    more = () if form in PLAIN_FORMS else (source, whole, together)
    if autocast:
        with torch.autocast(device, enabled=False):
            return FORMS[form](*given, *more)
    return FORMS[form](*given, *more)


def _each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def _padded(
    x: Tensor, padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """The padding in numbers; "same" with an odd sum puts one more behind, as torch does."""
    if not isinstance(padding, str):
        return x, _each(padding, len(kernel))
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, [n for t in reversed(total) for n in (0, t % 2)])
    return x, tuple(t // 2 for t in total)
