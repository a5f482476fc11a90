"""nn.MultiheadAttention with the projections of each sample's own adapter, in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.mixed_rows import NOTHING, Batch, RowBranch, forward_of
from lora_lightning.adapters.mixed_split import attention_dims
from lora_lightning.adapters.rows import Layout
from lora_lightning.adapters.stacks import Stack
from lora_lightning.layers.layer import LoRALayer


def can_mix(module: nn.Module, layouts: Sequence[Layout]) -> bool:
    """Whether `MixedAttention` computes it: attention with one matrix for queries, keys and values, without
    keys of its own, and no DoRA of that matrix."""
    if (
        not isinstance(module, nn.MultiheadAttention)
        or forward_of(module) is not nn.MultiheadAttention.forward
    ):
        return False
    here = (layout.updates.get(cast(LoRALayer, module), {}) for layout in layouts)
    dora = any(update.lora_magnitude is not None for updates in here for update in updates.values())
    plain = {"in_proj_weight", "in_proj_bias"} <= module._parameters.keys()
    return (
        plain and module._qkv_same_embed_dim and module.bias_k is None and not (module.add_zero_attn or dora)
    )


class MixedAttention:
    """The forward of attention.

    Args:
        path: its name in the model.
        layouts: of the adapters.
    """

    def __init__(self, module: nn.MultiheadAttention, path: str, layouts: Sequence[Layout]) -> None:
        self.module = module
        parts = {"": module, "out_proj": module.out_proj}
        self.branches = {
            name: RowBranch(part, f"{path}.{name}".strip("."), layouts, "")
            for name, part in parts.items()
            if isinstance(part, LoRALayer)
        }
        self.batch = NOTHING

    def begin(self, batch: Batch) -> None:
        """From now on the module computes for this batch."""
        self.batch = batch
        for branch in self.branches.values():
            branch.begin(batch)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention; `is_causal` says of the mask what the mask says itself."""
        module, samples = self.module, self.batch.samples
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        attention_dims(samples, module, (query, key, value), masks)  # refuses what has no samples
        q, k, v = self._projected(query, key, value)  # (batch, heads, tokens, size of a head)
        mask = _joined(attn_mask, key_padding_mask, q)
        dropout, weights = module.dropout if module.training else 0.0, None
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = y.transpose(1, 2).flatten(2)  # (batch, tokens, features)
        if "out_proj" in self.branches:
            y = self.branches["out_proj"].along(0, y)
        else:
            y = F.linear(y, module.out_proj.weight, module.out_proj.bias)
        return (y if module.batch_first else y.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        size = self.module.embed_dim
        if query is key and key is value:
            parts = list(self._rows(query, 0, 3 * size).chunk(3, dim=-1))
        else:
            inputs = enumerate((query, key, value))
            parts = [self._rows(x, i * size, (i + 1) * size) for i, x in inputs]
        if not self.module.batch_first:
            parts = [part.transpose(0, 1) for part in parts]
        return [part.unflatten(-1, (self.module.num_heads, -1)).transpose(1, 2) for part in parts]

    def _rows(self, x: Tensor, start: int, end: int) -> Tensor:
        """What some rows of the matrix and its updates make of x."""
        own, branch = self.module._parameters, self.branches.get("")
        weight, bias = cast(Tensor, own["in_proj_weight"]), own["in_proj_bias"]
        y = F.linear(x, weight[start:end], None if bias is None else bias[start:end])
        for stack in [] if branch is None else branch.stacks(x):
            self._add(y, x, stack, start, end)
        return y

    def _add(self, y: Tensor, x: Tensor, stack: Stack, start: int, end: int) -> None:
        first, last = stack.slot.out_range or (0, 3 * self.module.embed_dim)
        low, high = max(first, start), min(last, end)
        if low >= high:
            return
        B = stack.B.squeeze(1)[:, low - first : high - first].mT  # (n, R, rows)
        h = torch.bmm(self._by_sample(x.contiguous()), stack.A.squeeze(1).mT.to(y.dtype))
        self._by_sample(y)[..., low - start : high - start].baddbmm_(h, B.to(h.dtype))

    def _by_sample(self, x: Tensor) -> Tensor:
        """A view of all tokens of each sample, (n, tokens, features); sequences come first only where each
        sample has one row of the batch."""
        n = len(self.batch.samples)
        return x.view(n, -1, x.shape[-1]) if self.module.batch_first else x.transpose(0, 1)


def _joined(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as what is added to the scores, (batch or 1, heads or 1, queries or 1, keys)."""
    parts = []
    if attn_mask is not None:
        parts.append(attn_mask.unflatten(0, q.shape[:2]) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        parts.append(key_padding_mask[:, None, None])
    added = [
        torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, -math.inf)
        if part.dtype == torch.bool
        else part.to(q.dtype)
        for part in parts
    ]
    return added[0] if len(added) == 1 else added[0] + added[1] if added else None
