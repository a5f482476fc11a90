"""LoRA for nn.Embedding and nn.EmbeddingBag: rows of a table, each with a small update of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.common import autocasts
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.size import FixedSize
from lora_lightning.layers.slot import Slot

# A begins at zero: rows that training never sees keep their values, as in PEFT.
EMBEDDING_SLOT = Slot("weight", transposed=True, zero="A")


def _expanded(h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """s·h·B, (..., d), in A's dtype: in float16, as autocast would have it, it could overflow."""
    if autocasts(h.device.type):
        with torch.autocast(h.device.type, enabled=False):
            return _expanded(h, B, scaling)
    return h * scaling @ B


class LoRAEmbedding(LoRALayer):
    """W[i] + s·A[:, i]ᵀ·B; i is an integer tensor, W is (n, d), A is (r, n), B is (r, d).

    The row of `padding_idx` gets no gradient, as in the base layer. With `scale_grad_by_freq`, where
    B's gradient depends on the indices too, the whole table's update is made.
    """

    num_embeddings = FixedSize("num_embeddings")

    if TYPE_CHECKING:
        padding_idx: int | None
        scale_grad_by_freq: bool

    def forward(self, i: Tensor) -> Tensor:
        if self.scale_grad_by_freq:
            return self._look_up(i, self.read("weight"))
        table, updates = self.parts("weight")
        y = self._look_up(i, table)
        for update in updates:
            A, B = update.factors()
            h = self._look_up(i, A.t())  # (...) -> (..., r)
            y = y + _expanded(h, B, update.scaling).to(y.dtype)
        return y

    def _look_up(self, i: Tensor, table: Tensor) -> Tensor:
        return F.embedding(i, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class LoRAEmbeddingBag(LoRALayer):
    """bag(i, W) + s·bag(i, Aᵀ)·B for sums and means; the whole table's update for a maximum, which is
    not linear, and with `scale_grad_by_freq`.

    Shapes as in `LoRAEmbedding`; gradients are dense, also where the base layer's are sparse.
    """

    num_embeddings = FixedSize("num_embeddings")

    if TYPE_CHECKING:
        padding_idx: int | None
        scale_grad_by_freq: bool
        mode: str
        include_last_offset: bool

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        if self.mode == "max" or self.scale_grad_by_freq:
            return self._bag(self.read("weight"), input, offsets, per_sample_weights)
        table, updates = self.parts("weight")
        y = self._bag(table, input, offsets, per_sample_weights)
        for update in updates:
            A, B = update.factors()
            h = self._bag(A.t(), input, offsets, per_sample_weights)  # (bags, r)
            y = y + _expanded(h, B, update.scaling).to(y.dtype)
        return y

    def _bag(self, table: Tensor, i: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        return F.embedding_bag(
            i,
            table,
            offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            per_sample_weights=None if weights is None else weights.to(table.dtype),
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
