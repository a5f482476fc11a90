"""LoRALayer: what every adapted layer shares: its updates, a weight that tells the truth, merging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.layers.swap import Swapped, swap_in, swap_out
from lora_lightning.layers.update import LowRankUpdate


class LoRALayer(Swapped):
    """Mixin for a layer whose `weight` is adapted.

    Reading `layer.weight` gives the effective weight W + sum of the active updates, wherever it is
    read; the base weight keeps its place in `_parameters["weight"]`, and so its name in
    `state_dict()`. Calling the layer takes the low-rank branch and never forms a gradient of W.

    Attributes:
        lora: adapter name -> LowRankUpdate.
        lora_active: names of the adapters in use.
    """

    lora: nn.ModuleDict
    lora_active: tuple[str, ...]
    prefix = "LoRA"

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this family cannot adapt `module`, or None when it can."""
        raise NotImplementedError

    @property
    def base_weight(self) -> nn.Parameter:
        """W, frozen; after `merge_updates` it holds the merged values."""
        return cast(nn.Parameter, self._parameters["weight"])

    @property
    def merged(self) -> bool:
        return "lora_unmerged_weight" in self._buffers

    @property
    def weight(self) -> Tensor:
        # An AttributeError in here would make nn.Module fall back to the base weight, silently.
        updates = list(self.active_updates())
        return effective_weight(self.base_weight, updates) if updates else self.base_weight

    def active_updates(self) -> Iterator[LowRankUpdate]:
        """The updates that a forward must add; none when they are merged into W."""
        if not self.merged:
            for name in self.lora_active:
                yield cast(LowRankUpdate, self.lora[name])

    def add_branches(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Add the active updates' outputs to y = layer(x), the output of the base weight and bias."""
        base = y
        for update in self.active_updates():
            branch = self.branch(update.dropout(x), update)
            factors = update.row_factors(self.base_weight)
            if factors is None:
                y = y + branch
            else:
                c = self.per_output(factors.to(y.dtype))
                product = base if bias is None else base - self.per_output(bias.to(base.dtype))
                y = y + (c - 1) * product + c * branch
        return y

    def branch(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        """s·B·A applied to x, of the shape of the layer's output."""
        raise NotImplementedError

    def per_output(self, values: Tensor) -> Tensor:
        """(out,) shaped to multiply the layer's output."""
        raise NotImplementedError

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + updates in W's dtype, the sum taken in float32 or better.

        Raises:
            UserError: an update is not finite.
        """
        merged = self.weight.detach()
        if not torch.isfinite(merged).all() and torch.isfinite(self.base_weight).all():
            raise UserError("the update holds NaN or infinity and cannot be merged")
        return merged

    def merge_updates(self, merged: Tensor) -> None:
        """Put `merged_weight()` in the place of W, keeping W for `unmerge_updates`."""
        self.register_buffer("lora_unmerged_weight", self.base_weight.data, persistent=False)
        self.base_weight.data = merged

    def unmerge_updates(self) -> None:
        """Put W back, bit for bit."""
        self.base_weight.data = cast(Tensor, self._buffers.pop("lora_unmerged_weight"))
        self._non_persistent_buffers_set.discard("lora_unmerged_weight")


def effective_weight(weight: Tensor, updates: list[LowRankUpdate]) -> Tensor:
    """W + sum of the updates, in W's dtype; the sum is taken in float32 or better."""
    delta = sum((u.delta(weight) for u in updates[1:]), updates[0].delta(weight))
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def adapt(module: nn.Module, family: type[LoRALayer], adapter: str, update: LowRankUpdate) -> None:
    """Turn `module` into an adapted layer of `family` with one active update."""
    swap_in(module, family)
    layer = cast(LoRALayer, module)
    layer.lora = nn.ModuleDict({adapter: update}).train(module.training)
    layer.lora_active = (adapter,)


def restore(layer: LoRALayer) -> None:
    """Undo `adapt`: the layer has its class and attributes of before."""
    swap_out(layer)
    del layer._modules["lora"], layer.__dict__["lora_active"]
