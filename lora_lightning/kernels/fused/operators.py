"""The fused operators as torch knows them, `torch.ops.lora_lightning`: schemas, shapes, and who computes.

A CUDA (or ROCm) device runs Triton's kernels; every other, and one without Triton, torch's own operations.
The meta device sees one operator each. They have no gradients: autograd functions call them.

    merge(W, A, B, scaling, dtype, adds) -> E
    merge_quantized(codes, scales, kind, A, B, scaling, dtype, adds) -> E
    factor_gradients(dY, u, mean, rstd, weight, bias, source, A, G, scaling, dropout, seed) -> dA, dB
    dropped_low_rank(x, A, dropout, seed, beside) -> H, or [x | H]
    dropped_sum(dX, G, A, dropout, seed) -> dX
    magnitude_gradient(dY, y, bias, magnitude) -> dm

T tokens. W is (d_out, d_in), dithered where it and E are of half precision; or codes and scales of a
`QuantizedTensor` of this kind. A is (r, d_in), B (d_out, r). E = [W + s·B·A | s·B | 0] is (d_out, d_in + r
rounded up to 16), each sum taken in float32 and rounded once; without `adds` W is in the sum's place. dA =
Gᵀ·X, (r, d_in), and dB = s·dYᵀ·(X·Aᵀ), (d_out, r), are float32; dY is (T, d_out), G (T, r), and X (T, d_in)
is made of u (T, d_in) by `source`: "identity", "gelu", "gelu_tanh", "silu", "relu", "layer_norm" with mean
and rstd (T,), weight and bias (d_in,) or None, "rms_norm" without mean and bias. With dropout, of
probability p, X̃ = M∘X / (1 - p) is in X's place, with a mask M of random bits of an entry's row, column
and the seed, (1,) int64 from 0 to 2^31: nobody saves it. H = X̃·Aᵀ, (T, r rounded up to 16), and dX +
M∘(G·A) / (1 - p), (T, d_in), are packed. dm =
(dY∘(y - bias)).sum(0) / magnitude, (d_out,), is float32, and 0 where the magnitude is. Rows may be apart. In
float64 torch's operations alone compute.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from lora_lightning.kernels.fused import plain, trust
from lora_lightning.kernels.quantized_tensor import QuantizedTensor

_library = torch.library.Library("lora_lightning", "DEF")
_SCHEMAS = (
    "merge(Tensor W, Tensor A, Tensor B, float scaling, ScalarType dtype, bool adds=True) -> Tensor",
    "merge_quantized(Tensor codes, Tensor scales, str kind, Tensor A, Tensor B, float scaling,"
    " ScalarType dtype, bool adds=True) -> Tensor",
    "factor_gradients(Tensor dY, Tensor u, Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? bias,"
    " str source, Tensor A, Tensor G, float scaling, float dropout=0.0, Tensor? seed=None)"
    " -> (Tensor, Tensor)",
    "dropped_low_rank(Tensor x, Tensor A, float dropout, Tensor seed, bool beside) -> Tensor",
    "dropped_sum(Tensor dX, Tensor G, Tensor A, float dropout, Tensor seed) -> Tensor",
    "magnitude_gradient(Tensor dY, Tensor y, Tensor? bias, Tensor magnitude) -> Tensor",
)
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _name = _schema.partition("(")[0]
    _library.impl(_name, torch.no_grad()(getattr(plain, _name)), "CompositeExplicitAutograd")
    if find_spec("triton") is not None:
        _library.impl(_name, getattr(trust, _name), "CUDA")


@torch.library.register_fake("lora_lightning::merge", lib=_library)
def _merge(W: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, adds: bool = True) -> Tensor:
    return W.new_empty(B.shape[0], plain.width(A.shape[1], A.shape[0]), dtype=dtype)


@torch.library.register_fake("lora_lightning::merge_quantized", lib=_library)
def _merge_quantized(
    codes: Tensor,
    scales: Tensor,
    kind: str,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    adds: bool = True,
) -> Tensor:
    return _merge(codes, A, B, scaling, dtype)


@torch.library.register_fake("lora_lightning::factor_gradients", lib=_library)
def _factor_gradients(
    dY: Tensor,
    u: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    source: str,
    A: Tensor,
    G: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(dY.dtype, torch.float32)
    return A.new_empty(A.shape, dtype=dtype), A.new_empty((dY.shape[1], A.shape[0]), dtype=dtype)


@torch.library.register_fake("lora_lightning::dropped_low_rank", lib=_library)
def _dropped_low_rank(x: Tensor, A: Tensor, dropout: float, seed: Tensor, beside: bool) -> Tensor:
    return x.new_empty(x.shape[0], plain.width(x.shape[1] if beside else 0, A.shape[0]))


@torch.library.register_fake("lora_lightning::dropped_sum", lib=_library)
def _dropped_sum(dX: Tensor, G: Tensor, A: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return dX.new_empty(dX.shape)


@torch.library.register_fake("lora_lightning::magnitude_gradient", lib=_library)
def _magnitude_gradient(dY: Tensor, y: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
    return dY.new_empty(dY.shape[1], dtype=torch.promote_types(dY.dtype, torch.float32))


merge = torch.ops.lora_lightning.merge.default
merge_quantized = torch.ops.lora_lightning.merge_quantized.default
factor_gradients = torch.ops.lora_lightning.factor_gradients.default
dropped_low_rank = torch.ops.lora_lightning.dropped_low_rank.default
dropped_sum = torch.ops.lora_lightning.dropped_sum.default
magnitude_gradient = torch.ops.lora_lightning.magnitude_gradient.default


def merged(W: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, adds: bool = True) -> Tensor:
    """E of a W of floats, or in few bits."""
    if type(W) is QuantizedTensor:
        E: Tensor = merge_quantized(W.codes, W.scales, W.kind, A, B, scaling, dtype, adds)
    else:
        E = merge(W, A, B, scaling, dtype, adds)
    return E
