"""The linear layer of `implementation="fused"` with dropout before A: neither mask nor X̃ is ever written.

Shapes as of `kernels.fused.linear`; M is the mask, which an entry's place and a seed give; X̃ = M∘x / (1 - p):

    E = [W | s·B],  H = X̃·Aᵀ,  y = [x | H]·Eᵀ + b  or  x·Wᵀ + b + H·(s·B)ᵀ
    [dX' | G] = dY·E,  dX = dX' + M∘(G·A) / (1 - p),  dA = Gᵀ·X̃,  dB = s·dYᵀ·(X̃·Aᵀ)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.common import autocasts, cast, graph_gradients, without_autocast
from lora_lightning.kernels.fused import operators
from lora_lightning.kernels.fused.inputs import Input
from lora_lightning.kernels.fused.plain import kept
from lora_lightning.kernels.half import shared_out
from lora_lightning.kernels.linear_form import plain
from lora_lightning.kernels.quantized_tensor import QuantizedTensor


class Dropping(NamedTuple):
    """s, p and the dtype of the products."""

    scaling: float
    dropout: float
    dtype: torch.dtype


def new_seed(x: Tensor) -> Tensor:
    """A seed on x's device, (1,): by torch's generator of that device, which a CUDA graph advances too."""
    return torch.randint(2**31, (1,), device=x.device)


def dropped_forward(
    x: Tensor, E: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, seed: Tensor, how: Dropping
) -> Tensor:
    """y, (..., d_out)."""
    with without_autocast(x.device.type):
        tokens, (d_out, d_in) = cast(x, how.dtype).reshape(-1, x.shape[-1]), (len(B), x.shape[-1])
        bias = None if bias is None else cast(bias, how.dtype)
        drops = how.dropout, seed
        if how.dtype == torch.float16:
            y, (down, up, _) = F.linear(tokens, E[:, :d_in], bias), shared_out(A, B, how.scaling, how.dtype)
            y.addmm_(operators.dropped_low_rank(tokens, down, *drops, False)[:, : len(A)], up.to(y.dtype).t())
        elif d_in < 2 * d_out:  # writing x once more is less than reading and writing y
            y = F.linear(operators.dropped_low_rank(tokens, A, *drops, True), E, bias)
        else:
            y = F.linear(tokens, E[:, :d_in], bias)
            y.addmm_(operators.dropped_low_rank(tokens, A, *drops, False), E[:, d_in:].t())
        return y.view(*x.shape[:-1], d_out).data  # as a view it could not be changed in place


def base_and_up(W: Tensor, A: Tensor, B: Tensor, how: Dropping) -> Tensor:
    """E = [W | s·B | 0]."""
    return operators.merged(W, A, B, how.scaling, how.dtype, adds=False)


class FusedDroppedFunction(torch.autograd.Function):
    """The layer with the gradients above; a second derivative is taken through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        seed: Tensor,
        how: Dropping,
        given: Input,
    ) -> Tensor:
        """Args beyond those of `lora_linear`:
        seed: (1,).
        given: what the backward makes x from.
        """
        E = base_and_up(W, A, B, how)
        if given.u is x:
            given = Input("identity", cast(x, how.dtype))
        ctx.how, ctx.source = how, given.source
        held = None if type(W) is QuantizedTensor else E
        ctx.save_for_backward(W, bias, A, B, seed, held, *given[1:])
        return dropped_forward(x, E, bias, A, B, seed, how)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        if autocasts(dY.device.type) and not torch.is_grad_enabled():
            with without_autocast(dY.device.type):
                return FusedDroppedFunction.backward(ctx, dY)
        W, bias, A, B, seed, E, *tensors = ctx.saved_tensors
        how, needs, given = ctx.how, ctx.needs_input_grad, Input(ctx.source, *tensors)
        dY2 = dY.reshape(-1, dY.shape[-1])  # (T, d_out)
        (rank, d_in), rest = A.shape, (None, None, None)
        if torch.is_grad_enabled():
            x = given.whole()
            dropped = x * kept(len(dY2), d_in, how.dropout, seed).view(x.shape) / (1 - how.dropout)
            y = plain(x, W, bias, A, B, None, how.scaling, dropped)
            return *graph_gradients(y, (x, W, bias, A, B), needs[:5], dY), *rest
        E = base_and_up(W, A, B, how) if E is None else E
        dX = dA = dB = None
        if needs[0]:
            both = dY2 @ E  # (T, d_in + r and more)
            G = both[:, d_in : d_in + rank]
            dX = operators.dropped_sum(both[:, :d_in], G, A, how.dropout, seed).view(*dY.shape[:-1], d_in)
        else:
            G = dY2 @ E[:, d_in : d_in + rank]
        if needs[3] or needs[4]:
            dA, dB = operators.factor_gradients(
                dY2, *given.by_tokens(), given.source, A, G, how.scaling, how.dropout, seed
            )
            dA, dB = (cast(t, A.dtype) if need else None for t, need in ((dA, needs[3]), (dB, needs[4])))
        return dX, None, dY2.sum(0) if needs[2] else None, dA, dB, *rest
