"""LoRA for nn.Linear and its subclasses that keep its forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lora_lightning.layers.branch import BranchLayer
from lora_lightning.layers.update import LowRankUpdate


class LoRALinear(BranchLayer):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ; x is (..., in), A is (r, in), B is (out, r)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.add_branches(x, F.linear(x, self.base("weight"), self.bias))

    def branch(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        h = F.linear(x, update.lora_A.to(x.dtype))  # (..., in) -> (..., r)
        return F.linear(h * update.scaling, update.lora_B.to(x.dtype))
