"""Which form a linear layer with a low-rank update takes, and the two in plain operations.

Shapes: x is (..., d_in); W is (d_out, d_in); A is (r, d_in); B is (d_out, r).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels import common, compiled, sources
from lora_lightning.kernels.common import cast, is_plain, product_dtype
from lora_lightning.kernels.dora import row_factors, scaled_change
from lora_lightning.kernels.half import shared_out
from lora_lightning.kernels.quantized_tensor import QuantizedTensor

SMALL = 2**18  # numbers in x and y together, up to which plain operations are the fastest: docs/speed.md
DENSE = 3 * 2**14  # numbers in W, whose gradient then takes no longer than what it would spare
MERGE_FROM = 2  # fresh memory for W' costs about as much again as the sum

# Not on a CPU: operations that a GPU's matrix units do in the time of moving a byte, in half precision and
# tf32, and in float32: an H100 reaches 650 and 60 TFLOP/s and 2.6 TB/s, an A100 250 and 17, and 1.6.
BALANCE, BALANCE_FLOAT = 200, 20
LARGEST = 2  # numbers in W' for each of x and y, up to which it is formed: it is kept for the backward


def plain(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    dropped: Tensor,
) -> Tensor:
    """The reference, in operations that autograd, compilers and function transforms know; and the fastest way
    for a few tokens.

    Args:
        dropped: X̃.
    """
    down, up, _ = shared_out(A, B, scaling, product_dtype(x))
    y = F.linear(x, W, bias)
    change = F.linear(F.linear(dropped, cast(down, x.dtype)), cast(up, x.dtype))
    if magnitude is not None:
        product = y if bias is None else y - bias.to(y.dtype)
        change = scaled_change(row_factors(magnitude, W, A, B, scaling), product, change)
    return y + change


def dense(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """x·(W + s·B·A)ᵀ + b in plain operations, with a gradient of W's shape: the fastest way for small W."""
    return F.linear(x, torch.addmm(W, cast(B, W.dtype), cast(A, W.dtype), alpha=scaling), bias)


class LinearSpec(NamedTuple):
    """How a layer computes, decided once by `linear_spec`.

    Attributes:
        form: "plain" and "dense" are the functions of these names; "merged" is `linear_merged`, "dropped"
            `linear_dropped` and "compiled" `compiled`; else it is "function".
        scaling: s.
        keep: 1 - the probability of dropping.
        dtype: of the products.
        autocast: whether it acts, and so is to be turned off.
        recompute: whether the backward makes x again where it can.
        merged: y comes from W + s·B·A; else y begins with the branch, or it is added.
        merged_back: dX comes from W + s·B·A.
        begins: y begins with the branch, onto which x·Wᵀ is added.
        backward: of "merged": "dense", "extended" or "apart"; of "compiled": "dense" or "extended".
        packed: of "extended": dX is copied, as what comes next would else do it.
    """

    form: str
    scaling: float = 1.0
    keep: float = 1.0
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    recompute: bool = True
    merged: bool = False
    merged_back: bool = False
    begins: bool = False
    backward: str = "dense"
    packed: bool = False


PLAIN_FORM, DENSE_FORM = LinearSpec("plain"), LinearSpec("dense")


def linear_spec(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    magnitude: Tensor | None,
    dropout: float,
    implementation: str,
    merged: bool | None,
) -> LinearSpec:
    """The rule, by what the tensors are and by their shapes. Arguments as of `lora_linear`.

    Where x and y are small, calls take longer than what they compute, and plain operations are the fastest:
    "dense" where W is no larger than they are, and for a gradient also small itself; else "plain".

    Of the function: W + s·B·A, of N = d_in·d_out numbers, is formed where a branch would touch more than 2·N:
    x and y, or x alone where it takes the place of writing b and the rank is no more than 16, above which its
    arithmetic takes longer than that; in the backward x, since dX begins with the branch. In half precision
    it never is; a branch loses of small updates what rounding W + s·B·A to nearest would (docs/rounding.md).
    """
    device, dtype = x.device.type, x.dtype
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast:
        dtype = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)
    elif W.dtype != dtype:
        return PLAIN_FORM
    half = dtype.itemsize < 4
    cpu = common.on_cpu(x.device)
    d_out, d_in = W.shape
    tokens = x.numel() // d_in
    if (
        implementation == "reference"
        or W.requires_grad
        or (half and magnitude is not None and (dropout or cpu))
    ):
        return PLAIN_FORM
    if not is_plain(x, None if type(W) is QuantizedTensor else W, bias, A, B, magnitude):
        if dropout or merged is False or not compiled.compiles(x, W, bias, A, B, magnitude):
            return PLAIN_FORM
        form = compiled.linear_form(x, d_out, dtype, magnitude is not None)
        return PLAIN_FORM if form == "plain" else LinearSpec("compiled", scaling, dtype=dtype, backward=form)
    again = implementation == "auto" and x.nbytes >= (sources.LEAST if cpu else sources.LEAST_OFF_CPU)
    touched, size = tokens * (d_in + d_out), d_in * d_out
    if not cpu:
        spec = LinearSpec("function", scaling, 1 - dropout, dtype, autocast, again)
        wanted = size <= LARGEST * touched if merged is None else merged
        if dropout:
            branch = magnitude is None and dtype != torch.float16 and type(W) is not QuantizedTensor
            return spec._replace(form="dropped") if wanted and branch else spec
        dora = magnitude is not None  # which takes the sum anyway, for its norms
        return _off_cpu(spec, x, d_out, dora) if wanted or dora else spec
    differentiates = torch.is_grad_enabled()
    small = touched < SMALL and not (again and differentiates)
    if small and implementation == "auto" and merged is None and magnitude is None:
        fits = size <= DENSE or not differentiates
        merges = not (half or dropout or type(W) is QuantizedTensor)
        return DENSE_FORM if merges and fits and 2 * touched >= size else PLAIN_FORM
    # where it gives the bits of F.linear for a branch of zeros: on a CPU that begins with b and adds x·Wᵀ
    begins = cpu and not half and (x.dim() == 2 or x.is_contiguous())
    if begins and bias is not None and A.shape[0] <= 16:
        touched = tokens * d_in
    least = MERGE_FROM * size
    forward = not dropout and (
        magnitude is not None or ((not half and touched > least) if merged is None else merged)
    )
    backward = not dropout and ((not half and tokens * d_in > least) if merged is None else merged)
    keep = 1 - dropout
    return LinearSpec("function", scaling, keep, dtype, autocast, again, forward, backward, begins)


def _off_cpu(spec: LinearSpec, x: Tensor, d_out: int, dora: bool) -> LinearSpec:
    """The rule for a device that is no CPU: "merged", with the backward that takes the least time there.

    Counted are the numbers moved for each token. dW takes the time of reading x and dY, or of its
    2·d_in·d_out operations. The products with r columns read x twice and dY once, and dY once more for G,
    unless G comes with dX: then dX's rows are further apart, and a layer norm's backward, which wants them
    packed, would copy them.
    """
    d_in, dtype, maker = x.shape[-1], spec.dtype, x.grad_fn
    packed = x.dtype == dtype and maker is not None and maker.name() == "NativeLayerNormBackward0"
    apart = 2 * d_in + 2 * d_out
    extended = apart - d_out + (2 * d_in if packed else 0)
    exact = dtype.itemsize >= 4 and torch.get_float32_matmul_precision() == "highest"
    operations = dtype.itemsize * (BALANCE_FLOAT if exact else BALANCE)  # for each number moved
    dense = max(d_in + d_out, 2 * d_in * d_out / operations)
    if dora or dense <= min(apart, extended):
        return spec._replace(form="merged", backward="dense")
    return spec._replace(form="merged", backward="extended" if extended < apart else "apart", packed=packed)
