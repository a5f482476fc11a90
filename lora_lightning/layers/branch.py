"""What the families with a low-rank branch share: the sum of their active updates' outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.dora import scaled_change
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.update import LowRankUpdate


class BranchLayer(LoRALayer):
    """Mixin for a layer y = f(x, W) + b, linear in W, whose update is s·f(f(x, A), B)."""

    has_branch = True
    channel_dim = -1  # of the output, where its features stand

    if TYPE_CHECKING:
        bias: Tensor | None

    def add_branches(self, x: Tensor, y: Tensor, updates: list[LowRankUpdate]) -> Tensor:
        """Add the updates' outputs to y = f(x, W) + b, the output of the base layer."""
        base = y
        for update in updates:
            change = self.branch(update.dropped(x), update)
            factors = update.row_factors(update.slot.of(self.base_weight("weight")))
            if factors is not None:
                product = base if self.bias is None else base - self._per_feature(self.bias.to(y.dtype))
                change = scaled_change(self._per_feature(factors), self._part(product, update), change)
            y = y + self._placed(change, update, y)
        return y

    def branch(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        """s·B·A applied to x: of the shape of the output, its features those of the update's rows."""
        raise NotImplementedError

    def _per_feature(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (-1 - self.channel_dim))

    def _part(self, y: Tensor, update: LowRankUpdate) -> Tensor:
        out_range = update.slot.out_range
        return (
            y if out_range is None else y.narrow(self.channel_dim, out_range[0], out_range[1] - out_range[0])
        )

    def _placed(self, change: Tensor, update: LowRankUpdate, y: Tensor) -> Tensor:
        """The change of some rows' features with zeros around, of the shape of y."""
        out_range = update.slot.out_range
        if out_range is None:
            return change
        return F.pad(
            change,
            [0, 0] * (-1 - self.channel_dim) + [out_range[0], y.shape[self.channel_dim] - out_range[1]],
        )
