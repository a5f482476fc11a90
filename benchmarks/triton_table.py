"""Registers, shared memory and spills of every Triton kernel, compiled ahead: no GPU is needed.

    python -m benchmarks.triton_table [--out FOLDER] [--check]

Each kernel is compiled with the constants that `kernels.fused.launch` gives it, for NVIDIA's sm_80 and
sm_90 and AMD's gfx942. On NVIDIA `ptxas` says what it took, on AMD the code object's own notes. `programs`
is how many fit a multiprocessor (a compute unit) by these numbers; 0 means that none can start. `--check`
fails on a spill or a 0. Nothing is run and no time is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_lightning.kernels.fused import launch
from lora_lightning.kernels.fused.dots import column_dots, divided_sum
from lora_lightning.kernels.fused.dropping import add_dropped, low_rank_rows
from lora_lightning.kernels.fused.merging import merge_weight
from lora_lightning.kernels.fused.passes import factor_pass, split_sum
from lora_lightning.utils.progress import working

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
COLUMNS = ["target", "kernel", "warps", "registers", "spilled", "shared", "programs"]
# Bytes of shared memory that one program may have, and that all on a multiprocessor share.
SHARED = {"sm_80": (163 * 1024, 164 * 1024), "sm_90": (227 * 1024, 228 * 1024), "gfx942": (65536, 65536)}
# Not multiples of 16 in general, of which a launcher would tell the compiler.
ODD = frozenset(
    {"T", "splits", "splits_one", "splits_other", "out_rank", "out_column", "left_part", "threshold"}
)


class Kernel(NamedTuple):
    """One kernel as the launcher would have it compiled.

    Attributes:
        name: what it does, for the table.
        function: a Triton kernel.
        pointers: the dtypes of the arguments that are one.
        constants: the values of the constants.
        floats: the arguments that are a float; the others are int32.
        warps, stages: as launched.
    """

    name: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    floats: tuple[str, ...]
    warps: int
    stages: int


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    rows = []
    for target in TARGETS:
        for kernel in working(list(kernels(target)), target, "kernels"):
            rows.append(
                {"target": target, "kernel": kernel.name, "warps": kernel.warps, **built(kernel, target)}
            )
            print(line(rows[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"triton": triton.__version__, "torch": torch.__version__, "kernels": rows}
    (options.out / "triton_table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "triton_table.md").write_text(table(rows), encoding="utf-8")
    wrong = [line(row) for row in rows if row["spilled"] or not row["programs"]]
    print(*(f"spills, or cannot start: {text}" for text in wrong), sep="\n")
    return 1 if options.check and wrong else 0


def kernels(target: str) -> Iterator[Kernel]:
    """Every kernel in the forms that differ in what they take."""
    amd = target == "gfx942"
    for rank, (dtype, name) in product((8, 32, 64, 256), NAMES.items()):
        if rank > launch.MOST_RANK.get(dtype, rank):
            continue  # it goes slice by slice
        precisions = ("ieee", "tf32") if name == "fp32" and not amd else ("ieee",)
        for precision in precisions:
            for source in launch.plain.SOURCES if name == "bf16" else ("gelu", "layer_norm"):
                yield first_pass(source, rank, dtype, amd, precision)
            if name == "bf16" or precision == "ieee":
                yield first_pass("layer_norm", rank, dtype, amd, precision, drops=True)
                yield low_rank(rank, dtype, amd, precision)
                yield dropped_sum(rank, dtype, amd, precision)
            for parts in (1, 3, 12) if rank == 8 else (1,):
                yield second_pass(rank, dtype, parts, amd, precision)
    yield Kernel(
        "sum of the splits", split_sum, dict.fromkeys(("one", "other", "out_one", "out_other"), "fp32"),
        {"BLOCK": 128, "DEEP": 16}, (), 4, 3,
    )  # fmt: skip
    for name in NAMES.values():
        dots = launch.DOTS
        yield Kernel(
            f"dY∘(y - b), {name}", column_dots, {"dY": name, "y": name, "bias": "fp32", "out": "fp32"},
            {"HAS_BIAS": True, "BLOCK_T": dots.tokens, "BLOCK_D": dots.columns}, (), dots.warps, dots.stages,
        )  # fmt: skip
    yield Kernel(
        "sum over m", divided_sum, dict.fromkeys(("parts", "magnitude", "out"), "fp32"),
        {"BLOCK": 128, "DEEP": 16}, (), 4, 3,
    )  # fmt: skip
    for rank in (8, 64, 256):
        for weight, dtype in zip(("fp32", "bf16", "fp16", "fp32"), (torch.bfloat16, *NAMES), strict=True):
            yield merging(weight, "float", rank, dtype)
        yield merging("i8", "int8", rank, torch.bfloat16)
        yield merging("u8", "nf4", rank, torch.bfloat16)


def first_pass(
    source: str, rank: int, dtype: torch.dtype, amd: bool, precision: str, drops: bool = False
) -> Kernel:
    name, blocks = NAMES[dtype], launch.blocks_for(source, rank, dtype, amd)
    pointers = {"u": name, "left": name} | dict.fromkeys(
        ("mean", "rstd", "weight", "bias", "down", "parts", "out"), "fp32"
    )
    own = {
        "SOURCE": source, "HAS_WEIGHT": "norm" in source, "HAS_BIAS": source == "layer_norm", "DOWN": True,
        "LEFT_PARTS": 1, "PIN": not amd, "out_column": 1, "left_part": 0, "DROPS": drops,
    }  # fmt: skip
    return _pass(
        f"first pass, {source}{' dropped' if drops else ''}", pointers, own, blocks, rank, dtype, precision
    )


def second_pass(rank: int, dtype: torch.dtype, parts: int, amd: bool, precision: str) -> Kernel:
    name, blocks = NAMES[dtype], launch.blocks_for("identity", rank, dtype, amd)
    pointers = dict.fromkeys(("mean", "rstd", "weight", "bias", "u"), name) | dict.fromkeys(
        ("down", "left", "parts", "out"), "fp32"
    )
    own = {
        "SOURCE": "identity", "HAS_WEIGHT": False, "HAS_BIAS": False, "DOWN": False, "LEFT_PARTS": parts,
        "PIN": False, "out_column": rank, "out_rank": 1, "down_row": 0,
        "DROPS": False, "grown": 1.0, "threshold": 0,
    }  # fmt: skip
    return _pass(f"second pass, {parts} parts", pointers, own, blocks, rank, dtype, precision)


def _pass(
    name: str, pointers: dict[str, str], own: dict[str, Any], blocks: launch.Blocks, rank: int,
    dtype: torch.dtype, precision: str,
) -> Kernel:  # fmt: skip
    constants = own | {
        "RANK": rank, "R": launch.padded(rank), "DTYPE": launch.DTYPES[dtype], "PRECISION": precision,
        "BLOCK_T": blocks.tokens, "BLOCK_D": blocks.columns,
    }  # fmt: skip
    kind = "tf32" if precision == "tf32" else NAMES[dtype]
    title = f"{name}, {kind}, r {rank}, {blocks.tokens} × {blocks.columns}"
    floats = "scale", "grown"
    return Kernel(
        title, factor_pass, pointers | {"seed": "i64"}, constants, floats, blocks.warps, blocks.stages
    )


def low_rank(rank: int, dtype: torch.dtype, amd: bool, precision: str) -> Kernel:
    blocks, name = launch.low_rank_blocks(rank, dtype), NAMES[dtype]
    pointers = {"x": name, "seed": "i64", "down": "fp32", "out": name}
    beside = launch.plain.width(0, rank)
    own = {"BESIDE": beside, "R": triton.next_power_of_2(beside), "COPIES": True}
    return _dropping("X̃·Aᵀ", low_rank_rows, pointers, own, blocks, rank, dtype, precision)


def dropped_sum(rank: int, dtype: torch.dtype, amd: bool, precision: str) -> Kernel:
    blocks, name = launch.sum_blocks(rank), NAMES[dtype]
    pointers = {"dX": name, "seed": "i64", "left": name, "down": "fp32", "out": name}
    own = {"R": launch.padded(rank)}
    return _dropping("dX + M∘(G·A)", add_dropped, pointers, own, blocks, rank, dtype, precision)


def _dropping(
    name: str, function: Any, pointers: dict[str, str], own: dict[str, Any], blocks: launch.Blocks, rank: int,
    dtype: torch.dtype, precision: str,
) -> Kernel:  # fmt: skip
    constants = own | {
        "RANK": rank, "DTYPE": launch.DTYPES[dtype], "PRECISION": precision,
        "BLOCK_T": blocks.tokens, "BLOCK_D": blocks.columns,
    }  # fmt: skip
    title = f"{name}, {NAMES[dtype]}, r {rank}, {blocks.tokens} × {blocks.columns}"
    return Kernel(title, function, pointers, constants, ("grown",), blocks.warps, blocks.stages)


def merging(weight: str, kind: str, rank: int, dtype: torch.dtype) -> Kernel:
    name = NAMES[dtype]
    pointers = {"W": weight, "scales": "fp32", "table": "fp32", "A": "fp32", "B": "fp32", "out": name}
    beside = -(-rank // launch.plain.ALIGNED) * launch.plain.ALIGNED
    rows, columns = launch.MERGED
    constants = {
        "RANK": rank, "BESIDE": beside, "R": triton.next_power_of_2(beside), "KIND": kind, "ADDS": True,
        "DITHER": weight == name != "fp32", "DTYPE": launch.DTYPES[dtype],
        "BLOCK_M": rows, "BLOCK_N": columns,
    }  # fmt: skip
    title = f"merge, {weight if kind == 'float' else kind} to {name}, r {rank}"
    return Kernel(title, merge_weight, pointers, constants, ("scaling",), 4, 3)


def built(kernel: Kernel, target: str) -> dict[str, int]:
    """What it takes: registers a thread, bytes spilled, bytes of shared memory, programs that fit."""
    arguments = kernel.function.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(arguments):
        if name in kernel.constants:
            signature[name] = "constexpr"
        elif name in kernel.pointers:
            signature[name] = "*" + kernel.pointers[name]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in kernel.floats:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name not in ODD:
                attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {(arguments.index(name),): value for name, value in kernel.constants.items()}
    source = ASTSource(kernel.function, signature, constants, attributes)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _from_notes if target == "gfx942" else _from_ptxas
    registers, spilled = read(compiled.asm, target)
    shared = compiled.metadata.shared
    fits = programs(target, registers, shared, kernel.warps)
    return {"registers": registers, "spilled": spilled, "shared": shared, "programs": fits}


def _from_ptxas(asm: dict[str, Any], target: str) -> tuple[int, int]:
    """The driver, which tells registers to Triton, is absent."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(asm["ptx"], encoding="utf-8")
        name = {"sm_90": "sm_90a"}.get(target, target)
        command = [assembler, "-v", f"--gpu-name={name}", ptx, "-o", Path(folder) / "kernel.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.findall(r"Used (\d+) registers", log)[0]), sum(
        map(int, re.findall(r"(\d+) bytes spill", log))
    )


def _from_notes(asm: dict[str, Any], target: str) -> tuple[int, int]:
    def note(name: str) -> int:
        return sum(map(int, re.findall(rf"\.{name}:\s+(\d+)", asm["amdgcn"])))

    return note("vgpr_count"), 4 * note("vgpr_spill_count") + note("private_segment_fixed_size")


def programs(target: str, registers: int, shared: int, warps: int) -> int:
    """How many fit a multiprocessor, or a compute unit, by registers, shared memory and warps."""
    most, whole = SHARED[target]
    if shared > most:
        return 0
    if target == "gfx942":  # four units, each with 512 registers a lane and 8 waves
        return min(4 * min(8, 512 // (-(-registers // 8) * 8)) // warps, whole // max(1, shared))
    return min(65536 // (-(-registers // 8) * 8 * 32 * warps), whole // (shared + 1024), 64 // warps)


def line(row: dict[str, Any]) -> str:
    return f"{row['target']:7s} {row['kernel']:52s} " + "  ".join(
        f"{name} {row[name]}" for name in ("registers", "spilled", "shared", "programs")
    )


HEAD = """# Triton's kernels, compiled ahead

Written by `python -m benchmarks.triton_table`; nothing was run. Registers are a thread's; shared memory and
spills are in bytes; `programs` is how many fit a multiprocessor or a compute unit.

Triton {triton}, torch {torch}.
"""


def table(rows: list[dict[str, Any]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([str(row[name]) for name in COLUMNS] for row in rows)]
    head = HEAD.format(triton=triton.__version__, torch=torch.__version__)
    return head + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
