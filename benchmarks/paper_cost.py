"""What the operators of a program cost on a GPU, counted where they run: on the meta device, without data.

An operator that is no view costs the bytes that it must read and write once, its multiplications and
additions (`torch.utils.flop_counter`), and as many kernels as `paper_rules` says, with what a CUDA kernel
does beside it out of sight: copies of inputs in a layout that it cannot read, a second pass. On a device it
takes the longest of the three, at the rates of `DEVICES`; operators follow each other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import paper_fused, paper_rules

# Allocations, and what the dispatcher asks; of an operator that is a view torch knows it itself.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
    "device", "is_same_size",
}  # fmt: skip
SHAPE_ONLY = {  # of their argument they take no more
    "new_zeros", "zeros_like", "ones_like", "new_ones", "new_full", "full_like", "rand_like", "randn_like",
}  # fmt: skip
OVERWRITES = {  # what they overwrite they do not read
    "copy_", "zero_", "fill_", "bernoulli_", "uniform_", "normal_", "_foreach_copy_", "_foreach_zero_",
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What a GPU reaches, not what its data sheet promises.

    Attributes:
        bandwidth: bytes a second.
        half: FLOP/s of products in bfloat16 or float16.
        tf32: of convolutions of float32, which torch lets take TF32 where the device has it.
        single: of products of float32.
        instructions: a second, of all lanes, in a kernel of ours.
        launch: seconds that a kernel takes at least, behind another.
        bfloat16: whether it multiplies bfloat16 as fast as float16.
    """

    bandwidth: float
    half: float
    tf32: float
    single: float
    instructions: float
    launch: float = 2.5e-6
    bfloat16: bool = True

    def peak(self, name: str, dtype: torch.dtype) -> float:
        if dtype.itemsize == 2:
            return self.half
        return self.tf32 if name.startswith("convolution") else self.single


# Of the H100 (SXM) 78 % of the bandwidth, 66 % of the half-precision products and 75 % of those in float32
# that its data sheet promises; the best product that others measured reaches 80 % (stas00/ml-engineering,
# "maximum achievable matmul FLOPS": 792 of 989 TFLOP/s; A100 268 of 312). The A100 (SXM, 80 GB) and the T4
# are given the same shares of theirs: 2,039 and 320 GB/s, 312 and 65 TFLOP/s, 19.5 and 8.1 in float32.
DEVICES = {
    "H100": Device(2.6e12, 650e12, 325e12, 50e12, 20e12),
    "A100": Device(1.58e12, 205e12, 102e12, 14.6e12, 6.8e12),
    "T4": Device(248e9, 43e12, 6e12, 6e12, 2.8e12, bfloat16=False),
}


@dataclass
class Sum:
    """What is added up; `seconds` on the device that was named."""

    calls: int = 0
    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def add(self, other: Sum) -> None:
        self.calls += other.calls
        self.launches += other.launches
        self.bytes += other.bytes
        self.flops += other.flops
        self.seconds += other.seconds


@dataclass(eq=False)
class Cost(TorchDispatchMode):
    """Counts the operators that run within this context, forward and backward alike.

    Attributes:
        device: on which they are to run.
        total: of all of them.
        by: of each operator by its name, those of other namespaces than aten with theirs; `copies` that
            kernels make of their inputs are counted apart.
    """

    device: Device
    total: Sum = field(default_factory=Sum)
    by: dict[str, Sum] = field(default_factory=dict)
    copies: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = name_of(func)
        if name in FREE or func.is_view:
            return out
        cost = self._cost(func, name, args, kwargs, out)
        for moved in paper_rules.hidden_kernels(name, args, kwargs, out):
            self.copies[name] += moved
            cost.add(Sum(0, 1, moved, 0, max(moved / self.device.bandwidth, self.device.launch)))
        self.total.add(cost)
        self.by.setdefault(name, Sum()).add(cost)
        return out

    def _cost(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Sum:
        if name.startswith(paper_fused.SPACE):
            return self._fused(paper_fused.kernels(name, args, out), args[0].dtype)
        moved = moved_bytes(func, name, args, kwargs, out) + paper_rules.second_pass(name, args, kwargs, out)
        flops = flops_of(func, name, args, kwargs, out)
        launches = paper_rules.launches(name, args, kwargs, out)
        dtype = next((t.dtype for t in tensors((args, kwargs, out)) if t.is_floating_point()), torch.float32)
        seconds = max(
            moved / self.device.bandwidth,
            flops / self.device.peak(name, dtype),
            launches * self.device.launch,
        )
        return Sum(1, launches, moved, flops, seconds)

    def _fused(self, kernels: list[paper_fused.Kernel], dtype: torch.dtype) -> Sum:
        found = Sum(calls=1)
        for moved, flops, instructions in kernels:
            seconds = max(
                moved / self.device.bandwidth,
                flops / self.device.peak("mm", dtype),
                instructions / self.device.instructions,
                self.device.launch,
            )
            found.add(Sum(0, 1, moved, flops, seconds))
        return found


def name_of(func: Any) -> str:
    """`mm`, of aten and prims without the namespace; of another namespace `name::operator`."""
    space, name = func._schema.name.split("::")
    return name if space in ("aten", "prim", "prims") else f"{space}::{name}"


def tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def moved_bytes(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """What is read of the arguments and written of the results, once; what is given twice is read once."""
    read: dict[int, Tensor] = {}
    if name not in SHAPE_ONLY:
        unread = (0,) if name in OVERWRITES else paper_rules.unread(name, args)
        for index, argument in enumerate(func._schema.arguments):
            if argument.is_out or index in unread:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            read.update({id(t): t for t in tensors(value)})
    changes = name.startswith("_foreach_") and name.endswith("_")  # its first list, and returns nothing
    written = {id(t): t for t in tensors(args[0] if changes else out)}
    return sum(touched(t) for t in (*read.values(), *written.values()))


def touched(tensor: Tensor) -> int:
    """Bytes; of an expanded tensor no more than its storage has."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def flops_of(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Multiplications and additions of products and convolutions, two for each pair."""
    if name in paper_rules.FLOPS:
        return paper_rules.FLOPS[name](args, out)
    packets = (func._overloadpacket, getattr(torch.ops.aten, name.removesuffix("_"), None))
    formula = next((flop_registry[p] for p in packets if p in flop_registry), None)
    if formula is None:
        return 0
    return int(formula(*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=out))
