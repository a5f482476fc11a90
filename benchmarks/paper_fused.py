"""What the fused operators cost: the kernels that `kernels/fused/launch.py` launches, with their own blocks.

An entry of x takes instructions beside bytes, since a pass makes it again in registers; how many was counted
in the machine code of such kernels for sm_90, rank 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lora_lightning.kernels.rounding import dithers

SPACE = "lora_lightning::"
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
INSTRUCTIONS = {  # an entry
    "identity": 3.7, "relu": 3.7, "silu": 24.0, "gelu": 24.0, "gelu_tanh": 24.0, "layer_norm": 13.0,
    "rms_norm": 13.0, "dY": 2.6, "merge": 20.0, "dithered": 34.0,
    "dropped": 9.0,  # by its operations, in the source: a hash, a comparison, a product
}  # fmt: skip


class Kernel(NamedTuple):
    bytes: int
    flops: int
    instructions: float = 0.0


def kernels(name: str, args: Any, out: Any) -> list[Kernel]:
    """Those of an operator of this package. One that is not known here is an error, and costs not nothing."""
    return COSTS[name](args, out)


def _merge(args: Any, out: Tensor) -> list[Kernel]:
    """merge(W, A, B, scaling, dtype) -> E"""
    W, A, B = args[:3]
    kind = "dithered" if dithers(W.dtype, out.dtype) else "merge"
    adds = len(args) < 6 or args[5]
    moved = W.nbytes + A.nbytes * adds + B.nbytes + out.nbytes
    return [Kernel(moved, 2 * A.shape[0] * W.numel() * adds, INSTRUCTIONS[kind] * W.numel())]


def _merge_quantized(args: Any, out: Tensor) -> list[Kernel]:
    """merge_quantized(codes, scales, kind, A, B, scaling, dtype) -> E"""
    codes, scales, _, A, B = args[:5]
    moved = sum(t.nbytes for t in (codes, scales, A, B, out))
    size = B.shape[0] * A.shape[1]
    return [Kernel(moved, 2 * A.shape[0] * size, INSTRUCTIONS["merge"] * size)]


def _factor_gradients(args: Any, out: tuple[Tensor, Tensor]) -> list[Kernel]:
    """factor_gradients(dY, u, mean, rstd, weight, bias, source, A, G, scaling) -> dA, dB"""
    from lora_lightning.kernels.fused.launch import MOST_PARTS, MOST_RANK, blocks_for, padded, splits_for

    dY, u, mean, rstd, _, _, source, A, G = args[:9]
    (T, d_out), d_in, found = dY.shape, A.shape[1], []
    for a in A.split(MOST_RANK.get(dY.dtype, 256)):
        rank = a.shape[0]
        one, two = (blocks_for(each, rank, dY.dtype, False) for each in (source, "identity"))
        columns, splits_one, _ = splits_for(T, d_in, one, PROGRAMS)
        columns_two, splits_two, _ = splits_for(T, d_out, two, PROGRAMS)
        parts = 4 * T * rank  # bytes of X·Aᵀ, of one block of columns
        sums = [4 * rank * splits_one * d_in, 4 * rank * splits_two * d_out]
        rows = sum(t.nbytes for t in (mean, rstd) if t is not None) + T * rank * G.element_size()
        first = u.nbytes + columns * rows + a.nbytes + columns * parts + sums[0]
        an_entry = INSTRUCTIONS[source] + (INSTRUCTIONS["dropped"] if len(args) > 10 and args[10] else 0)
        found.append(Kernel(first, 4 * T * d_in * rank, an_entry * T * d_in))
        if columns * padded(rank) > MOST_PARTS:
            found.append(Kernel((columns + 1) * parts, 0))
            columns = 1
        second = dY.nbytes + columns_two * columns * parts + sums[1]
        found.append(Kernel(second, 2 * T * d_out * rank, INSTRUCTIONS["dY"] * T * d_out))
        found.append(Kernel(sum(sums) + 4 * rank * (d_in + d_out), 0))
    return found


def _dropped_low_rank(args: Any, out: Tensor) -> list[Kernel]:
    """dropped_low_rank(x, A, dropout, seed, beside) -> H, or [x | H]"""
    x, A = args[:2]
    an_entry = INSTRUCTIONS["dY"] + INSTRUCTIONS["dropped"]
    return [Kernel(x.nbytes + A.nbytes + out.nbytes, 2 * x.numel() * len(A), an_entry * x.numel())]


def _dropped_sum(args: Any, out: Tensor) -> list[Kernel]:
    """dropped_sum(dX, G, A, dropout, seed) -> dX"""
    dX, G, A = args[:3]
    columns = -(-dX.shape[1] // 64)  # blocks, each of which reads G
    moved = dX.numel() * dX.element_size() + columns * G.numel() * G.element_size() + A.nbytes + out.nbytes
    an_entry = INSTRUCTIONS["dY"] + INSTRUCTIONS["dropped"]
    return [Kernel(moved, 2 * dX.numel() * len(A), an_entry * dX.numel())]


def _magnitude_gradient(args: Any, out: Tensor) -> list[Kernel]:
    """magnitude_gradient(dY, y, bias, magnitude) -> dm"""
    from lora_lightning.kernels.fused.launch import DOTS, splits_for

    dY = args[0]
    _, splits, _ = splits_for(*dY.shape, DOTS, PROGRAMS)
    moved = 2 * dY.numel() * dY.element_size() + splits * out.nbytes
    return [Kernel(moved, 0, INSTRUCTIONS["dY"] * dY.numel()), Kernel((splits + 2) * out.nbytes, 0)]


COSTS: dict[str, Callable[[Any, Any], list[Kernel]]] = {
    f"{SPACE}merge": _merge,
    f"{SPACE}merge_quantized": _merge_quantized,
    f"{SPACE}factor_gradients": _factor_gradients,
    f"{SPACE}dropped_low_rank": _dropped_low_rank,
    f"{SPACE}dropped_sum": _dropped_sum,
    f"{SPACE}magnitude_gradient": _magnitude_gradient,
}
