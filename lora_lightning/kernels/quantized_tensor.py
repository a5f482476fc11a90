"""QuantizedTensor: a frozen matrix in 8 or 4 bits that everything else takes for the matrix itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from lora_lightning.errors import UserError
from lora_lightning.utils.digests import digest

BLOCK = 64  # entries of NF4 that share a scale, as in the paper
aten = torch.ops.aten


class QuantizedTensor(Tensor):
    """A matrix W of which 8 or 4 bits an entry are kept; it has W's shape and dtype and never trains.

    "int8": W ≈ scales·codes, one scale a row, ‖row‖∞ / 127 (Dettmers et al. 2022, arXiv 2208.07339, section
    2, without the decomposition of outliers). "nf4": 16 quantiles of the normal distribution, one scale for
    each 64 entries (Dettmers et al. 2023, arXiv 2305.14314, section 3, without the second quantization of
    the scales), by bitsandbytes.

    Every operation reads the matrix as `dequantize` gives it; one in place writes what it has computed back,
    rounded. What copies or moves the tensor copies and moves the codes. A linear layer keeps the codes for
    its backward, not the matrix.

    Attributes:
        codes: int8 (out, in), or uint8 with two entries a byte.
        scales: float32 (out, 1), or (blocks,).
        kind: "int8" or "nf4".
        digest: names the matrix that was quantized (`digests.digest`).
    """

    codes: Tensor
    scales: Tensor
    kind: str
    digest: str

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, kind: str, shape: Sequence[int], dtype: torch.dtype, digest: str
    ) -> QuantizedTensor:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        made.codes, made.scales, made.kind, made.digest = codes, scales, kind, digest
        return cast(QuantizedTensor, made)

    @classmethod
    def of(cls, matrix: Tensor, kind: str) -> QuantizedTensor:
        """The matrix, (out, in), rounded."""
        codes, scales = QUANTIZERS[kind](matrix.detach())
        return cls(codes, scales, kind, matrix.shape, matrix.dtype, digest(matrix))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, (out, in), in its own dtype or the one given; fresh memory."""
        return DEQUANTIZERS[self.kind](self.codes, self.scales, self.shape, dtype or self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes more
        return f"QuantizedTensor({self.kind}, {tuple(self.shape)}, {self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["codes", "scales"], (self.kind, self.dtype, self.digest)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], meta: Any, size: Any, stride: Any
    ) -> QuantizedTensor:
        kind, dtype, digest = meta
        return QuantizedTensor(inner["codes"], inner["scales"], kind, size, dtype, digest)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = (self.codes, self.scales, self.kind, tuple(self.shape), self.dtype, self.digest)
        return QuantizedTensor, parts

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return (_linear if func is F.linear else func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as a method
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch.inference_mode(False):  # a view of a parameter is none that inference alone may see
            return cls._operation(func, args, dict(kwargs or {}))

    @staticmethod
    def _operation(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func in SAME and (kwargs.get("dtype") or torch.float32).is_floating_point:
            return _moved(func, args[0], args[1:], kwargs)
        written = _written(func, args, kwargs)
        dense = tree_map_only(QuantizedTensor, QuantizedTensor.dequantize, (tuple(args), kwargs))
        result = func(*dense[0], **dense[1])
        if not written:
            return result
        args[0]._write(dense[0][0], args[1] if func is aten.copy_.default else None)
        return args[0]

    def _write(self, matrix: Tensor, source: Any) -> None:
        """Take other values. A copy of a quantized tensor has its digest; where a matrix gives the codes that
        are there already, as when DDP sends each process the values that it has, the digest stays."""
        if is_quantized(source) and source.kind == self.kind:
            codes, scales, self.digest = source.codes, source.scales, source.digest
        else:
            codes, scales = QUANTIZERS[self.kind](matrix)
            if not (torch.equal(codes, self.codes) and torch.allclose(scales, self.scales, rtol=1e-6)):
                self.digest = digest(matrix)
        self.codes.copy_(codes)
        self.scales.copy_(scales)


# What gives the same matrix, elsewhere or in another dtype.
SAME = (aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default)


def is_quantized(tensor: Any) -> bool:
    return type(tensor) is QuantizedTensor


def _moved(
    func: Any, tensor: QuantizedTensor, args: Sequence[Any], kwargs: dict[str, Any]
) -> QuantizedTensor:
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    kwargs.pop("memory_format", None)
    codes, scales = func(tensor.codes, *args, **kwargs), func(tensor.scales, *args, **kwargs)
    return QuantizedTensor(codes, scales, tensor.kind, tensor.shape, dtype, tensor.digest)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation writes into its first argument and that is quantized.

    Raises:
        NotImplementedError: it writes into another one that is.
    """
    named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    into = [
        a.name
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
        and any(is_quantized(t) for t in tree_leaves(named.get(a.name)))
    ]  # fmt: skip
    if into and not (is_quantized(args[0]) and into == [func._schema.arguments[0].name]):
        raise NotImplementedError(f"{func} cannot write into a quantized weight")
    return bool(into)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """`F.linear` that keeps the codes for the backward."""
    if is_quantized(input) or not is_quantized(weight):
        return F.linear(input, weight, bias)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed or not torch.is_grad_enabled():
        return F.linear(input, weight.dequantize(), bias)
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    """y = x·Wᵀ + b, dX = dY·W and db = dY.sum, of a W that does not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight.detach())  # another object: a parameter that is held cannot be moved
        return F.linear(x, weight.dequantize(), bias)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        dbias = dY.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dY @ weight.dequantize(dY.dtype), None, dbias


def _to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    wide = matrix.float()
    scales = (wide.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scales).round_().to(torch.int8), scales


def _from_int8(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_(scales)


def _to_nf4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    operators = _bitsandbytes()
    codes, scales = operators.quantize_4bit(matrix.float().contiguous(), BLOCK, "nf4", torch.uint8)
    return codes, scales


def _from_nf4(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    has = dtype if dtype.itemsize <= 4 else torch.float32
    return _bitsandbytes().dequantize_4bit(codes, scales, BLOCK, "nf4", list(shape), has).to(dtype)


@cache
def _bitsandbytes() -> Any:
    """Its operators. On some CPUs it warns at import that a product with 4-bit weights will be slow, which is
    not used here."""
    if find_spec("bitsandbytes") is None:
        raise UserError("nf4 needs bitsandbytes: pip install 'lora-lightning[nf4]', or take int8.")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401  # only whether it is there
    finally:
        logger.setLevel(level)
    return torch.ops.bitsandbytes


QUANTIZERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"int8": _to_int8, "nf4": _to_nf4}
DEQUANTIZERS: dict[str, Callable[..., Tensor]] = {"int8": _from_int8, "nf4": _from_nf4}

torch.serialization.add_safe_globals([QuantizedTensor])
