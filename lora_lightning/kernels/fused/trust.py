"""Triton's kernels, compared with torch's operations on their first call in a process: for each operator,
form of it and dtype, on each device. They have no way back: what differs, or cannot be launched, is an
error."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.kernels import rounding
from lora_lightning.kernels.fused import plain

TOKENS = 4096  # that the comparison takes at a time, in float64
# Rounding errors of a product's factors, relative to the sum of its terms' sizes.
UNITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
TF32 = 2.0**-11
ROUNDINGS = 3.01  # of X, A and H, each by a unit at worst: where there are many terms it is far less
_compared: set[Hashable] = set()


def merge(W: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, adds: bool = True) -> Tensor:
    """`plain.merge` by Triton."""
    given = W, A, B, scaling, dtype, adds
    return _run("merge", (W.dtype, dtype), W.device, given, _merged_error)


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
    """`plain.merge_quantized` by Triton."""
    given = codes, scales, kind, A, B, scaling, dtype, adds
    return _run("merge_quantized", (kind, dtype), codes.device, given, _merged_error)


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
    """`plain.factor_gradients` by Triton."""
    given = dY, u, mean, rstd, weight, bias, source, A, G, scaling, dropout, seed
    form = source, dY.dtype, *(() if seed is None else ("dropout",))
    return _run("factor_gradients", form, dY.device, given, _gradients_error)


def dropped_low_rank(x: Tensor, A: Tensor, dropout: float, seed: Tensor, beside: bool) -> Tensor:
    """`plain.dropped_low_rank` by Triton."""
    form = x.dtype, "beside x" if beside else "alone"
    return _run("dropped_low_rank", form, x.device, (x, A, dropout, seed, beside), _low_rank_error)


def dropped_sum(dX: Tensor, G: Tensor, A: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """`plain.dropped_sum` by Triton."""
    return _run("dropped_sum", (dX.dtype,), dX.device, (dX, G, A, dropout, seed), _sum_error)


def magnitude_gradient(dY: Tensor, y: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
    """`plain.magnitude_gradient` by Triton."""
    given = dY, y, bias, magnitude
    return _run("magnitude_gradient", (dY.dtype,), dY.device, given, _magnitude_error)


def _run(
    name: str,
    form: tuple[Any, ...],
    device: torch.device,
    given: tuple[Any, ...],
    error: Callable[..., float],
) -> Any:
    """What Triton gives; the first time if it is right.

    Args:
        error: of (what Triton gave, what was given): 1 is the most that rounding explains.

    Raises:
        UserError: it is wrong, or did not run.
    """
    key = name, form, device
    if key in _compared or _is_captured(device):
        return _launched(name, device, given)
    what = f"{name} ({', '.join(str(f).removeprefix('torch.') for f in form)}) on {_named(device)}"
    try:
        got = _launched(name, device, given)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # a compiler, a driver: anything
        raise UserError(
            f"implementation='fused': Triton could not run {what}: {_first_line(problem)} "
            "Take implementation='auto', which needs no Triton."
        ) from problem
    if (off := error(got, given)) > 1:
        raise UserError(
            f"implementation='fused': Triton's {what} is wrong on its first call: off by {off:.3g} times "
            "what rounding explains. Take implementation='auto', and report this with the versions of torch "
            "and Triton."
        )
    _compared.add(key)
    return got


def _launched(name: str, device: torch.device, given: tuple[Any, ...]) -> Any:
    """On the tensors' own device, whichever is the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return getattr(_launch(), name)(*given)


def _launch() -> Any:
    from lora_lightning.kernels.fused import launch  # where Triton is missing nothing of it is imported

    return launch


def _is_captured(device: torch.device) -> bool:
    """A CUDA graph is recorded, in which nothing can be read; the same was run before, to warm up."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _first_line(problem: Exception) -> str:
    text = str(problem).strip().partition("\n")[0] or type(problem).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _merged_error(E: Tensor, given: tuple[Any, ...]) -> float:
    """Half a unit, or a whole one where the sum is dithered."""
    *W, A, B, scaling, dtype, adds = given
    base = W[0] if len(W) == 1 else plain.dequantized(W[0], W[1], W[2], (B.shape[0], A.shape[1]))
    A, B = A.double(), B.double() * scaling
    right, terms = torch.zeros_like(E, dtype=torch.float64), torch.zeros_like(E, dtype=torch.float64)
    right[:, : A.shape[1]] = base.double() + B @ A * adds
    terms[:, : A.shape[1]] = base.double().abs() + B.abs() @ A.abs() * adds
    right[:, A.shape[1] : A.shape[1] + len(A)] = B
    info = torch.finfo(dtype)
    units = (1 if rounding.dithers(base.dtype, dtype) else 0.5) * (
        right.abs() * info.eps + info.smallest_normal * info.eps
    )
    return _largest(E.double(), right, units + UNITS[torch.float32] * terms)


def _gradients_error(got: tuple[Tensor, Tensor], given: tuple[Any, ...]) -> float:
    dY, u, mean, rstd, weight, bias, source, A, G, scaling, dropout, seed = given
    unit, least = _unit(dY.dtype)
    A, (weight, bias) = A.double(), (None if t is None else t.double() for t in (weight, bias))
    sums = [torch.zeros_like(t, dtype=torch.float64) for t in (*got, *got)]
    for first, dy, x, m, r, g in _tokens(dY, u, mean, rstd, G):
        X = plain.SOURCES[source](x, m, r, weight, bias)
        size = _size(source, X, x, m, r, weight, bias, unit) + least
        if seed is not None:
            X, size = (plain.dropped(t, dropout, seed, first) for t in (X, size))
        sums[0] += g.t() @ X
        sums[1] += scaling * dy.t() @ (X @ A.t())
        sums[2] += g.abs().t() @ size
        sums[3] += abs(scaling) * dy.abs().t() @ (size @ (A.abs() + least).t() + least)
    tiny = torch.finfo(torch.float32).tiny
    return max(
        _largest(t.double(), right, ROUNDINGS * unit * size + tiny)
        for t, right, size in zip(got, sums[:2], sums[2:], strict=True)
    )


def _low_rank_error(H: Tensor, given: tuple[Any, ...]) -> float:
    x, A, dropout, seed, beside = given
    if beside:
        same = torch.equal(H[:, : x.shape[1]].nan_to_num(), x.nan_to_num())
        H = H[:, x.shape[1] :] if same else torch.full_like(H[:, x.shape[1] :], float("nan"))
    (unit, least), A, found = _unit(x.dtype), A.double(), [0.0]
    for first, X, h in _tokens(x, H):
        X = plain.dropped(X, dropout, seed, first)
        right, size = torch.zeros_like(h), torch.full_like(h, least)
        right[:, : len(A)] = X @ A.t()
        size[:, : len(A)] += (X.abs() + least) @ (A.abs() + least).t()
        found.append(_largest(h, right, ROUNDINGS * unit * size))
    return max(found)


def _sum_error(out: Tensor, given: tuple[Any, ...]) -> float:
    dX, G, A, dropout, seed = given
    (unit, least), A, found = _unit(dX.dtype), A.double(), [0.0]
    for first, dx, g, own in _tokens(dX, G, out):
        change, size = (plain.dropped(t, dropout, seed, first) for t in (g @ A, g.abs() @ (A.abs() + least)))
        found.append(_largest(own, dx + change, ROUNDINGS * unit * (dx.abs() + size + least)))
    return max(found)


def _magnitude_error(dm: Tensor, given: tuple[Any, ...]) -> float:
    dY, y, bias, magnitude = given
    right, size = (torch.zeros_like(dm, dtype=torch.float64) for _ in range(2))
    b, m = torch.zeros_like(right) if bias is None else bias.double(), magnitude.double()
    for _, dy, own in _tokens(dY, y):
        right += (dy * (own - b)).sum(0)
        size += (dy.abs() * (own.abs() + b.abs())).sum(0)
    tiny = torch.finfo(torch.float32).tiny
    return _largest(dm.double() * m, right * (m != 0), UNITS[torch.float32] * size + tiny)


def _unit(dtype: torch.dtype) -> tuple[float, float]:
    """A unit of products of this dtype, and the size below which the distances stay the same."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    unit, info = TF32 if tf32 else UNITS[dtype], torch.finfo(dtype)
    return unit, info.smallest_normal * info.eps / unit


def _tokens(*tensors: Any) -> Iterator[list[Any]]:
    """Some tokens of each at a time, in float64, and behind how many."""
    for first in range(0, tensors[0].shape[0], TOKENS):
        yield [first, *(None if t is None else t[first : first + TOKENS].double() for t in tensors)]


def _size(
    source: str, X: Tensor, u: Tensor, mean: Any, rstd: Any, weight: Any, bias: Any, unit: float
) -> Tensor:
    """What an entry of X is rounded in proportion to: itself in its dtype, in float32 what cancels."""
    if source in ("identity", "relu", "rms_norm"):
        return X.abs()
    terms = u.abs()
    if source == "layer_norm":
        terms = (terms + mean.abs()[:, None]) * rstd[:, None]
        terms = terms if weight is None else terms * weight.abs()
        terms = terms if bias is None else terms + bias.abs()
    return X.abs() + 2.0**-22 / unit * terms


def _largest(got: Tensor, right: Tensor, bound: Tensor) -> float:
    """The largest error, in bounds, where the right value is finite; infinite where that alone is."""
    if not right.numel():
        return 0.0
    off = (got - right).abs() / bound
    off = torch.where(right.isfinite(), off.nan_to_num(nan=float("inf")), 0.0)
    return float(off.max())
