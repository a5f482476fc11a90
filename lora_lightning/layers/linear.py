"""LoRA for nn.Linear and its subclasses that keep its forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.functional import lora_linear
from lora_lightning.layers.branch import BranchLayer
from lora_lightning.layers.size import FixedSize
from lora_lightning.layers.update import LowRankUpdate


class LoRALinear(BranchLayer):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ; x is (..., in), A is (r, in), B is (out, r)."""

    in_features, out_features = FixedSize("in_features"), FixedSize("out_features")

    def forward(self, x: Tensor) -> Tensor:
        update, own = self.alone(), self._parameters
        weight = own.get("weight")
        if update is None or weight is None or "bias" not in own:  # under FSDP they are elsewhere
            return self._several(x)
        return lora_linear(
            x,
            weight,
            own["bias"],
            *update.factors(),
            update.scaling,
            magnitude=update.lora_magnitude,
            dropout=update.dropout if update.training else 0.0,
            implementation=update.implementation,
            member=self,
        )

    def _several(self, x: Tensor) -> Tensor:
        """With none, several, or those of some outputs, and in a view of the model."""
        W, updates = self.parts("weight")
        if not updates or not _are_one(updates):
            return self.add_branches(x, F.linear(x, W, self.bias), updates)
        first = updates[0]
        return lora_linear(
            x,
            W,
            self.bias,
            *_joined(updates, W.shape[0]),
            magnitude=first.lora_magnitude,
            dropout=first.drops,
            implementation=first.implementation,
        )

    def branch(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        down, up = update.factors_for(x)
        return F.linear(F.linear(x, down), up)  # (..., in) -> (..., r) -> (..., out)


def _are_one(updates: list[LowRankUpdate]) -> bool:
    """Whether their sum is a single update: DoRA's is not, nor are those that drop differently."""
    first = updates[0]
    alone = len(updates) == 1 and first.slot.out_range is None
    return first.implementation != "reference" and (
        alone or all(u.lora_magnitude is None and u.drops == first.drops for u in updates)
    )


def _joined(updates: list[LowRankUpdate], d_out: int) -> tuple[Tensor, Tensor, float]:
    """A, B and s of the sum: A of all ranks one under the other, B with zeros where rows are not meant.
    The updates see x with the same entries dropped."""
    first = updates[0]
    if len(updates) == 1 and first.slot.out_range is None:
        return *first.factors(), first.scaling
    rows, columns = [], []
    for update in updates:
        A, B = update.factors()
        start, end = update.slot.out_range or (0, d_out)
        rows.append(A.to(first.lora_A.dtype))
        columns.append(F.pad(B * update.scaling, (0, 0, start, d_out - end)))
    return torch.cat(rows), torch.cat(columns, dim=1).to(rows[0].dtype), 1.0
