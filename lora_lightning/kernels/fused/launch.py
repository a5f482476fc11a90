"""Launching the kernels: block sizes, splits over the tokens, memory. Imports Triton."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lightning.kernels import rounding
from lora_lightning.kernels.fused import plain
from lora_lightning.kernels.fused.dots import column_dots, divided_sum
from lora_lightning.kernels.fused.dropping import add_dropped, low_rank_rows
from lora_lightning.kernels.fused.merging import merge_weight
from lora_lightning.kernels.fused.passes import factor_pass, split_sum

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
MOST_PARTS = 192  # parts of H times the padded rank that the second pass sums up: each has its shared memory
MOST_RANK = {torch.float32: 64}  # that a pass takes without spilling, else 256; more goes slice by slice
MERGED = (16, 256)  # rows and columns of W of a program


class Blocks(NamedTuple):
    """Of a pass: tokens and columns of a tile, warps, stages of the pipeline."""

    tokens: int
    columns: int
    warps: int
    stages: int


DOTS = Blocks(32, 128, 4, 2)


def blocks_for(source: str, rank: int, dtype: torch.dtype, amd: bool) -> Blocks:
    """None spills: benchmarks/results/triton_table.md."""
    if dtype == torch.float32:
        return Blocks(32 if rank <= 32 and not amd else 16, 64, 4, 2)
    if amd:
        return Blocks(16, 64, 8, 2) if rank > 64 else Blocks(32, 64 if rank > 16 else 128, 4, 2)
    if rank > 64:
        return Blocks(32, 64, 8, 2)
    if rank > 16:
        return Blocks(64, 128, 8, 2)
    return Blocks(64, 256, 8, 2) if source == "identity" else Blocks(32, 256, 8, 3)


def padded(rank: int) -> int:
    """The rank as the kernels' products take it."""
    return max(16, triton.next_power_of_2(rank))


def splits_for(T: int, D: int, blocks: Blocks, programs: int) -> tuple[int, int, int]:
    """Column blocks, splits of the tokens, and tokens of a split, for about so many programs."""
    columns = triton.cdiv(D, blocks.columns)
    splits = max(1, min(triton.cdiv(programs, columns), triton.cdiv(T, blocks.tokens)))
    span = triton.cdiv(triton.cdiv(T, splits), blocks.tokens) * blocks.tokens
    return columns, triton.cdiv(T, span), span


@cache
def programs_of(device: torch.device) -> int:
    """Two a multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


def is_amd() -> bool:
    """Whether torch's "cuda" is ROCm: tiles of other sizes, and no assembly that pins them."""
    return torch.version.hip is not None


def precision_of(dtype: torch.dtype) -> str:
    """Products of float32 in tf32 where torch's own may be."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def merge(W: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, adds: bool = True) -> Tensor:
    return _merge(W, None, "float", A, B, scaling, dtype, adds)


def merge_quantized(
    codes: Tensor,
    scales: Tensor,
    kind: str,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    adds: bool = True,
) -> Tensor:
    return _merge(codes, scales, kind, A, B, scaling, dtype, adds)


def _merge(
    W: Tensor,
    scales: Tensor | None,
    kind: str,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    adds: bool,
) -> Tensor:
    W, A, B = plain.rows([W, A, B])  # type: ignore[assignment]  # none is None
    (rank, d_in), d_out = A.shape, B.shape[0]
    out = W.new_empty(d_out, plain.width(d_in, rank), dtype=dtype)
    beside = out.shape[1] - d_in
    rows, columns = MERGED
    grid = triton.cdiv(d_in, columns), triton.cdiv(d_out, rows)
    table = nf4_table(W.device) if kind == "nf4" else A
    merge_weight[grid](
        W, A if scales is None else scales, table, A, B, out,
        d_out, d_in, W.stride(0), A.stride(0), B.stride(0), out.stride(0), scaling,
        RANK=rank, BESIDE=beside, R=triton.next_power_of_2(beside), KIND=kind, ADDS=adds,
        DITHER=adds and kind == "float" and rounding.dithers(W.dtype, dtype), DTYPE=DTYPES[dtype],
        BLOCK_M=rows, BLOCK_N=columns, num_warps=4,
    )  # fmt: skip
    return out


@cache
def nf4_table(device: torch.device) -> Tensor:
    """The 16 numbers of nf4, as bitsandbytes has them: read off by dequantizing each code."""
    codes = (torch.arange(16, dtype=torch.uint8, device=device) * 17)[:, None]  # (16, 1): both of a byte's
    unit = torch.ones(1, device=device)
    return plain.DEQUANTIZERS["nf4"](codes, unit, (16, 2), torch.float32)[:, 0].contiguous()


def factor_gradients(
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
    most = MOST_RANK.get(dY.dtype, 256)
    if A.shape[0] > most:
        slices = zip(A.split(most), G.split(most, dim=1), strict=True)
        norm, drops = (mean, rstd, weight, bias), (dropout, seed)
        found = [factor_gradients(dY, u, *norm, source, a, g, scaling, *drops) for a, g in slices]
        return torch.cat([dA for dA, _ in found]), torch.cat([dB for _, dB in found], dim=1)
    down, c = plain.shared_out(A, dY.dtype)
    dY, u, down, G = plain.rows([dY, u, down, G])  # type: ignore[assignment]  # none is None
    (T, d_out), (rank, d_in) = dY.shape, A.shape
    dA, dB = (dY.new_empty(shape, dtype=torch.float32) for shape in ((rank, d_in), (d_out, rank)))
    if not T:
        return dA.zero_(), dB.zero_()
    programs = programs_of(dY.device)
    one, two = (blocks_for(each, rank, dY.dtype, is_amd()) for each in (source, "identity"))
    columns, splits_one, span_one = splits_for(T, d_in, one, programs)
    columns_two, splits_two, span_two = splits_for(T, d_out, two, programs)
    parts = dA.new_empty(columns, T, rank)
    sums_one, sums_two = dA.new_empty(splits_one, dA.numel()), dA.new_empty(splits_two, dB.numel())
    mean, rstd = (u if t is None else t for t in (mean, rstd))
    common = {
        "RANK": rank, "R": padded(rank), "DTYPE": DTYPES[dY.dtype], "PRECISION": precision_of(dY.dtype),
        "PIN": not is_amd(),
    }  # fmt: skip
    factor_pass[columns, splits_one](
        u, mean, rstd, u if weight is None else weight, u if bias is None else bias,
        u if seed is None else seed, down, G, parts, sums_one,
        T, d_in, u.stride(0), G.stride(0), 0, down.stride(0), dA.numel(), 1, d_in, span_one, 1.0,
        plain.threshold(dropout), 1 / (1 - dropout), DROPS=seed is not None,
        SOURCE=source, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, DOWN=True, LEFT_PARTS=1,
        BLOCK_T=one.tokens, BLOCK_D=one.columns, num_warps=one.warps, num_stages=one.stages, **common,
    )  # fmt: skip
    if columns * padded(rank) > MOST_PARTS:
        parts, columns = parts.sum(0), 1
    factor_pass[columns_two, splits_two](
        dY, dY, dY, dY, dY, dY, dY, parts, parts, sums_two,
        T, d_out, dY.stride(0), rank, T * rank, 0, dB.numel(), rank, 1, span_two, scaling, 0, 1.0,
        SOURCE="identity", DROPS=False, HAS_WEIGHT=False, HAS_BIAS=False, DOWN=False, LEFT_PARTS=columns,
        BLOCK_T=two.tokens, BLOCK_D=two.columns, num_warps=two.warps, num_stages=two.stages, **common,
    )  # fmt: skip
    split_sum[triton.cdiv(dA.numel(), 128) + triton.cdiv(dB.numel(), 128),](
        sums_one, sums_two, dA, dB, dA.numel(), dB.numel(), splits_one, splits_two,
        BLOCK=128, DEEP=16, num_warps=4,
    )  # fmt: skip
    return dA, dB if c is None else dB.mul_(c)


def dropped_low_rank(x: Tensor, A: Tensor, dropout: float, seed: Tensor, beside: bool) -> Tensor:
    x, A = plain.rows([x, A])  # type: ignore[assignment]  # none is None
    (T, d_in), rank = x.shape, A.shape[0]
    width = plain.width(0, rank)
    out = x.new_empty(T, width + d_in if beside else width)
    blocks = low_rank_blocks(rank, x.dtype)
    low_rank_rows[triton.cdiv(T, blocks.tokens),](
        x, seed, A, out, T, d_in, x.stride(0), A.stride(0), out.stride(0),
        plain.threshold(dropout), 1 / (1 - dropout), COPIES=beside,
        RANK=rank, BESIDE=width, R=triton.next_power_of_2(width), DTYPE=DTYPES[x.dtype],
        PRECISION=precision_of(x.dtype), BLOCK_T=blocks.tokens, BLOCK_D=blocks.columns,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out


def dropped_sum(dX: Tensor, G: Tensor, A: Tensor, dropout: float, seed: Tensor) -> Tensor:
    dX, G, A = plain.rows([dX, G, A])  # type: ignore[assignment]  # none is None
    (T, d_in), rank = dX.shape, A.shape[0]
    out = dX.new_empty(T, d_in)
    blocks = sum_blocks(rank)
    add_dropped[triton.cdiv(d_in, blocks.columns), triton.cdiv(T, blocks.tokens)](
        dX, seed, G, A, out, T, d_in, dX.stride(0), G.stride(0), A.stride(0),
        plain.threshold(dropout), 1 / (1 - dropout), RANK=rank, R=padded(rank), DTYPE=DTYPES[dX.dtype],
        PRECISION=precision_of(dX.dtype), BLOCK_T=blocks.tokens, BLOCK_D=blocks.columns,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out


def magnitude_gradient(dY: Tensor, y: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
    dY, y = plain.rows([dY, y])  # type: ignore[assignment]  # none is None
    T, D = dY.shape
    out = dY.new_empty(D, dtype=torch.float32)
    if not T:
        return out.zero_()
    columns, splits, span = splits_for(T, D, DOTS, programs_of(dY.device))
    parts = out.new_empty(splits, D)
    column_dots[columns, splits](
        dY, y, dY if bias is None else bias, parts, T, D, dY.stride(0), y.stride(0), span,
        HAS_BIAS=bias is not None, BLOCK_T=DOTS.tokens, BLOCK_D=DOTS.columns, num_warps=DOTS.warps,
        num_stages=DOTS.stages,
    )  # fmt: skip
    divided_sum[triton.cdiv(D, 128),](parts, magnitude, out, D, splits, BLOCK=128, DEEP=16, num_warps=4)
    return out


def low_rank_blocks(rank: int, dtype: torch.dtype) -> Blocks:
    """Of X̃·Aᵀ."""
    return Blocks(32, 32 if dtype == torch.float32 or rank > 64 else 64, 4, 2)


def sum_blocks(rank: int) -> Blocks:
    """Of dX + M∘(G·A)."""
    return Blocks(32, 64, 4, 2) if rank <= 64 else Blocks(16, 32, 4, 2)
