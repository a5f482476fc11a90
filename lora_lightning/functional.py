"""The layers as functions of their tensors: fast autograd functions with a plain reference beside each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import is_plain, product_dtype, without_autocast
from lora_lightning.kernels.linear import LoRALinearFunction, Options, forward, plain
from lora_lightning.kernels.sources import source_of


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
    kernel: str = "auto",
    merged: bool | None = None,
) -> Tensor:
    """y = x·(W + s·B·A)ᵀ + b, for a frozen W (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    The gradients of A and B are made from products with r columns, never from a gradient of W's shape;
    x is not kept for the backward where it can be made again from what the layer norm, GELU or SiLU
    before it saved anyway. Works under autocast, where A and B stay in float32 and W is cast in passing.

    Args:
        x: (..., d_in).
        weight: W, (d_out, d_in). Where it requires a gradient the reference is taken.
        bias: (d_out,) or None; it may train.
        A: (r, d_in).
        B: (d_out, r).
        scaling: s.
        magnitude: DoRA's m, (d_out,): rows of W + s·B·A are scaled to these norms, which are held
            constant in the backward (Liu et al. 2024, arXiv 2402.09353, equation 5 and section 4.3).
        dropout: probability of dropping an entry of x on its way to A.
        kernel: "auto"; "keep_inputs" saves x always; "reference" is plain autograd. Compilers,
            function transforms, forward mode and tensor subclasses take the reference by themselves.
        merged: whether to form W + s·B·A or to add a branch; None decides by the shapes
            (`kernels.linear.merges`). Without effect with dropout, which needs a branch, and with DoRA,
            which forms the sum for its norms.

    Returns:
        (..., d_out), for B = 0 and dropout or not the very bits of `F.linear(x, weight, bias)`.
    """
    if not _fast(x, weight, bias, A, B, magnitude, kernel):
        return plain(x, weight, bias, A, B, magnitude, scaling, F.dropout(x, dropout, dropout > 0))
    mask = None
    if dropout:
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout).contiguous()
    options = Options(scaling, 1 - dropout, merged, product_dtype(x))
    if not torch.is_grad_enabled():
        with without_autocast(x.device.type):
            return forward(x, weight, bias, A, B, magnitude, mask, options)[0]
    source = source_of(x, recompute=kernel == "auto")
    y: Tensor = LoRALinearFunction.apply(x, weight, bias, A, B, magnitude, mask, options, source)
    return y


def _fast(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    kernel: str,
) -> bool:
    """Whether the autograd function does these arguments."""
    return (
        kernel != "reference"
        and not weight.requires_grad
        and (weight.dtype == x.dtype or product_dtype(x) != x.dtype)
        and is_plain(x, weight, bias, A, B, magnitude)
        and (magnitude is None or product_dtype(x).itemsize >= 4)
    )
