"""What the benchmarks measure: interleaved times, bytes saved for the backward, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.utils.progress import working

MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_memory() -> None:
    """Let glibc keep what is freed, as long as the process lives.

    It gives memory at the heap's top back and takes it anew, up to 100,000 page faults a step: how many, the
    models that share the process decide by chance, and no way of training.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library
        return
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(parameter, 2**31 - 1)


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 2,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round runs every step once, so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in working(range(warm_up + rounds), "measuring", "rounds"):
        for name, step in steps.items():
            wait(device)
            start = clock()
            step()
            wait(device)
            if index >= warm_up:
                times[name].append(clock() - start)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Of each: median and quartiles over the rounds of its time relative to `base` in the same round."""
    found = {}
    for name, seconds in times.items():
        relative = [a / b for a, b in zip(seconds, times[base], strict=True)]
        low, middle, high = statistics.quantiles(relative, n=4, method="inclusive")
        found[name] = {
            "ms": 1e3 * statistics.median(seconds), "ratio": middle, "low": low, "high": high
        }  # fmt: skip
    return found


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that the forward's graph keeps, those of parameters and buffers left out."""
    with saving(model) as kept:
        forward()
    return sum(kept.values())


@contextlib.contextmanager
def saving(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of the storages that graphs made in this context keep, by the storages' addresses, those of
    parameters and buffers left out."""
    own = {part.untyped_storage()._cdata for t in _tensors(model) for part in parts(t)}
    kept: dict[int, int] = {}
    tensors = []  # kept alive, so that no storage's address is counted twice

    def pack(tensor: Tensor) -> Tensor:
        for part in parts(tensor):
            storage = part.untyped_storage()
            if storage._cdata not in own:  # the meta device has no addresses of data
                kept[storage._cdata] = storage.nbytes()
                tensors.append(part)
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    unpack.identity = True  # type: ignore[attr-defined]  # see lora_lightning.kernels.sources
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers, as they are kept."""
    return sum(part.nbytes for t in _tensors(model) for part in parts(t))


def parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors of which a quantized one, ours or bitsandbytes', consists."""
    if hasattr(tensor, "codes"):
        return tensor.codes, tensor.scales
    state = getattr(tensor, "quant_state", None)
    return (tensor.data,) if state is None else (tensor.data, state.absmax)


def _tensors(model: nn.Module) -> tuple[Tensor, ...]:
    return *model.parameters(), *model.buffers()


def peak_bytes(step: Callable[[], object], device: str = "cpu", steps: int = 3) -> int:
    """Peak of the device's memory, or of the whole process's on the CPU, over a few steps."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(_field("/proc/self/status", "VmHWM").split()[0]) * 1024


def allocated(device: str) -> int:
    """Bytes of the GPU that tensors hold now."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def machine(threads: int, device: str) -> dict[str, Any]:
    return {"device": device_name(device), "threads": threads, "torch": torch.__version__}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else _field("/proc/cpuinfo", "model name")


def _field(path: str, name: str) -> str:
    """A value from one of Linux's files about the machine and the process."""
    return next(
        line.split(":")[1].strip() for line in Path(path).read_text().splitlines() if line.startswith(name)
    )


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
