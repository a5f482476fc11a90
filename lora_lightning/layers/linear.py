"""LoRA for nn.Linear and its subclasses that keep its forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.update import LowRankUpdate


class LoRALinear(LoRALayer):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ; x is (..., in), A is (r, in), B is (out, r)."""

    if TYPE_CHECKING:
        bias: Tensor | None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if not isinstance(module, nn.Linear):
            return f"{type(module).__name__} is not a linear layer"
        if type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} has a forward of its own"
        return None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.base_weight, self.bias)
        return self.add_branches(x, y, self.bias)

    def branch(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        h = F.linear(x, update.lora_A.to(x.dtype))  # (..., in) -> (..., r)
        return F.linear(h * update.scaling, update.lora_B.to(x.dtype))

    def per_output(self, values: Tensor) -> Tensor:
        return values
