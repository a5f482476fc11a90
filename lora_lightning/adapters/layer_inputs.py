"""The inputs of a layer as the rows that its weight is multiplied with: of matrices, convolutions, attention
and RNNs, as each computes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lora_lightning.layers.slot import read_weight

ROWS = 4096  # of one batch, the most that are looked at, drawn evenly
BASES = (nn.LSTM, nn.GRU, nn.RNN)


class Draw:
    """Chooses rows by random numbers of its own: the same in every run and process."""

    def __init__(self) -> None:
        self.numbers = torch.Generator().manual_seed(0)

    def some(self, count: int, device: torch.device) -> Tensor:
        """Indices of at most `ROWS` of so many rows."""
        if count <= ROWS:
            return torch.arange(count, device=device)
        return torch.randperm(count, generator=self.numbers)[:ROWS].sort().values.to(device)

    def of(self, x: Tensor, dim: int = -1) -> Tensor:
        """Some of the vectors along a dimension of x, (T, size)."""
        rows = x.movedim(dim, -1)
        picked = torch.unravel_index(self.some(rows[..., 0].numel(), x.device), rows.shape[:-1])
        return rows[picked]


def patches(x: Tensor, kernel: Sequence[int], options: dict[str, Any], draw: Draw) -> Tensor:
    """What a convolution multiplies with its kernel at some of its positions, (T, channels, kernel's size).

    Args:
        x: (batch, channels, *size), or one sample without the batch.
        options: stride, padding and dilation, each a number, a number for each dimension, or padding "same"
            or "valid".
    """
    count = len(kernel)
    x = x if x.dim() == count + 2 else x.unsqueeze(0)
    stride, dilation = _each(options["stride"], count), _each(options["dilation"], count)
    x = F.pad(x, _padding(options["padding"], kernel, dilation))
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    places = (len(x), *size)
    first, *rest = torch.unravel_index(draw.some(torch.Size(places).numel(), x.device), places)
    index = [first.view(-1, *[1] * count)]
    for i, start in enumerate(rest):
        along = start[:, None] * stride[i] + torch.arange(kernel[i], device=x.device) * dilation[i]
        index.append(along.view(-1, *[kernel[i] if j == i else 1 for j in range(count)]))
    found = x.movedim(1, -1)[tuple(index)]  # (T, *kernel, channels)
    return found.movedim(-1, 1).flatten(2)


def by_groups(found: Tensor, groups: int, columns: int) -> Tensor:
    """Patches (T, channels, kernel's size) as rows of each group of a weight, (groups, T, columns); those of
    a depthwise convolution, whose update has one group, are rows of one matrix."""
    rows = found.reshape(len(found), -1, columns)  # (T, groups of the convolution, columns)
    return rows.movedim(1, 0) if groups > 1 else rows.reshape(1, -1, columns)


def attended(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What an attention multiplies with the weight of its output projection, which it never calls: its output
    with the identity for that projection."""
    size = module.embed_dim
    weight = module.out_proj.weight
    identity = nn.Linear(size, size, bias=False, device="meta")
    identity.weight = nn.Parameter(torch.eye(size, device=weight.device, dtype=weight.dtype), False)
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {"out_proj": identity}
    output: Tensor = type(module).forward(twin, *args, **kwargs)[0]
    return output


def recurrent_rows(module: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The rows (T, columns) of every weight of an RNN but its projection `weight_hr`, whose inputs stay
    inside: its layers are run one by one, without the dropout between them."""
    x, state = (*args, kwargs.get("hx"))[:2] if args else (kwargs["input"], kwargs.get("hx"))
    x, lengths = padded(module, x)
    hidden = state[0] if isinstance(state, tuple) else state
    if hidden is not None and hidden.dim() == 2:
        hidden = hidden.unsqueeze(1)
    inside = torch.arange(len(x), device=x.device)[:, None] < lengths.to(x.device)  # (time, batch)
    found: dict[str, Tensor] = {}
    ways = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        outputs = []
        for way in range(ways):
            suffix, number = f"l{layer}" + ("_reverse" if way else ""), layer * ways + way
            z = turned(x, lengths) if way else x
            initial = None if state is None else state_of(state, number)
            out = one_layer(module, suffix, z.shape[-1])(z, initial)[0]
            first = torch.zeros_like(out[:1]) if hidden is None else hidden[number : number + 1].to(out.dtype)
            found[f"weight_ih_{suffix}"] = z[inside]
            found[f"weight_hh_{suffix}"] = torch.cat([first, out[:-1]])[inside]
            outputs.append(turned(out, lengths) if way else out)
        x = torch.cat(outputs, -1)
    return found


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """As `F.pad` wants it, the last dimension first."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(p, p) for p in _each(padding, len(kernel))]
    return [side for pair in reversed(pairs) for side in pair]


def padded(module: nn.RNNBase, x: Tensor | PackedSequence) -> tuple[Tensor, Tensor]:
    """(time, batch, features), and the length of each sequence of the batch."""
    if isinstance(x, PackedSequence):
        times, lengths = pad_packed_sequence(x)
        return times, lengths
    if x.dim() == 2:
        x = x.unsqueeze(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, torch.full((x.shape[1],), len(x))


def turned(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence backwards, within its length; what is behind it stays."""
    times = torch.arange(len(x))[:, None]
    index = torch.where(times < lengths, lengths - 1 - times, times).to(x.device)  # (time, batch)
    return x.gather(0, index.unsqueeze(-1).expand_as(x))


def state_of(state: Any, number: int) -> Any:
    """The initial state of one layer and direction."""
    if isinstance(state, tuple):
        return tuple(state_of(part, number) for part in state)
    part = state if state.dim() == 3 else state.unsqueeze(1)
    return part[number : number + 1]


def one_layer(module: nn.RNNBase, suffix: str, size: int) -> nn.RNNBase:
    """One layer in one direction, with its weights."""
    base = next(base for base in BASES if isinstance(module, base))
    options: dict[str, Any] = {"bias": module.bias}
    if base is nn.LSTM:
        options["proj_size"] = module.proj_size
    if base is nn.RNN:
        options["nonlinearity"] = cast(nn.RNN, module).nonlinearity
    one = base(size, module.hidden_size, device="meta", **options)
    names = {n: f"{n.removesuffix('l0')}{suffix}" for n in dict(one.named_parameters())}
    for name, original in names.items():
        setattr(one, name, nn.Parameter(read_weight(module, original).detach(), False))
    return one
