"""Case: a setting of a layer family, and what a model does with its layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


def plainly(layer: nn.Module, *inputs: Tensor) -> Any:
    return layer(*inputs)


@dataclass(frozen=True)
class Case:
    """A layer and how it is used.

    Attributes:
        layer: builds it; it is called "layer" in its model.
        shapes: of the float inputs, made anew for each test; or a function that makes all the inputs.
        call: what the model does with its layer.
        targets: `target_modules`.
        options: other fields of LoRAConfig.
        batch: dimension of the batch in every input and output, or None where there is none.
    """

    layer: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] | Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Any] = plainly
    targets: tuple[str, ...] = ("layer",)
    options: dict[str, Any] = field(default_factory=dict)
    batch: int | None = 0

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        made = self.shapes() if callable(self.shapes) else tuple(torch.randn(*shape) for shape in self.shapes)
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in made)


def indices(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.arange(torch.Size(shape).numel()).view(shape) * 3 % 7,)


def attend(layer: nn.Module, *inputs: Tensor) -> Any:
    query, key, value = (inputs * 3)[:3]
    return layer(query, key, value)


def attend_masked(layer: nn.Module, x: Tensor) -> Any:
    mask = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool, device=x.device).triu(1)
    return layer(x, x, x, attn_mask=mask, need_weights=False)


def attend_padded(layer: nn.Module, x: Tensor) -> Any:
    padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    padding[:, -2:] = True
    return layer(x, x, x, key_padding_mask=padding, average_attn_weights=False)


def grow(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, output_size=[2 * size for size in x.shape[2:]])


def packed(layer: nn.Module, x: Tensor) -> Any:
    lengths = torch.arange(x.shape[0]) % x.shape[1] + 1
    return layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))


def with_state(layer: nn.Module, x: Tensor, *state: Tensor) -> Any:
    return layer(x, state if len(state) > 1 else state[0])


def weigh(layer: nn.Module, i: Tensor, weights: Tensor) -> Tensor:
    return layer(i, per_sample_weights=weights)
