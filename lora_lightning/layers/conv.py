"""LoRA for nn.Conv2d with one group, and its subclasses that keep its forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.update import LowRankUpdate


class LoRAConv(LoRALayer):
    """conv(x, W) + s·B·conv(x, A): A is a convolution to r channels, B a 1×1 one; stride, padding
    and dilation are the layer's own.

    x is (batch, in, height, width), A is (r, in, k, k), B is (out, r); merged, W + s·B·A with A
    flattened to (r, in·k·k), as in PEFT.
    """

    if TYPE_CHECKING:
        bias: Tensor | None

        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if not isinstance(module, nn.Conv2d):
            return f"{type(module).__name__} is not a 2-D convolution"
        if type(module).forward is not nn.Conv2d.forward:
            return f"{type(module).__name__} has a forward of its own"
        if module.groups != 1:
            return "a grouped convolution"
        return None

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x, self.base_weight, self.bias)
        return self.add_branches(x, y, self.bias)

    def branch(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        h = self._conv_forward(x, update.lora_A.to(x.dtype), None)  # r channels, the output's size
        return F.conv2d(h * update.scaling, update.lora_B.to(x.dtype)[:, :, None, None])

    def per_output(self, values: Tensor) -> Tensor:
        return values[:, None, None]
