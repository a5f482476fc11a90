"""LoRA for nn.Embedding: rows of a table looked up, each with a small update of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from lora_lightning.layers.branch import BranchLayer
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LowRankUpdate

# A begins at zero: rows that training never sees keep their values, as in PEFT.
EMBEDDING_SLOT = Slot("weight", transposed=True, zero="A")


class LoRAEmbedding(BranchLayer):
    """W[i] + s·A[:, i]·B; i is an integer tensor, W is (n, d), A is (r, n), B is (r, d).

    The row of `padding_idx` gets no gradient, as in the base layer.
    """

    has_branch = False  # dropout on indices has no meaning

    if TYPE_CHECKING:
        padding_idx: int | None
        scale_grad_by_freq: bool

    def forward(self, i: Tensor) -> Tensor:
        y = self._look_up(i, self.base("weight"))
        for update in self.active_updates("weight"):
            y = y + self.branch(i, update).to(y.dtype)
        return y

    def branch(self, i: Tensor, update: LowRankUpdate) -> Tensor:
        h = self._look_up(i, update.lora_A.t())  # (...) -> (..., r)
        return h * update.scaling @ update.lora_B

    def _look_up(self, i: Tensor, table: Tensor) -> Tensor:
        return F.embedding(i, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
