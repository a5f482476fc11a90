"""LowRankUpdate: the matrices A and B of one weight, their scaling, and what they add to the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from lora_lightning.kernels.common import autocasts, product_dtype, without_autocast
from lora_lightning.kernels.dora import row_factors, row_norms
from lora_lightning.kernels.half import shared_out
from lora_lightning.kernels.rounding import rounded
from lora_lightning.layers.factors import init_factors, joined_factors, put_sides, sides
from lora_lightning.layers.slot import Slot

FIXED = ("lora_fixed_A", "lora_fixed_B")  # those that never train
LEAVES = ("lora_A", "lora_B", "lora_magnitude", "lora_mixture", *FIXED)  # names of an update's parameters


class LowRankUpdate(nn.Module):
    """The update s·B·A of one weight W (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    With a fixed part of rank q it is s·(B·A + F_B·F_A), where F_A and F_B never train. What begins at a
    B0·A0 that is not zero has F_B·F_A = -B0·A0, so that the base weight stays what it is. To whoever
    computes with it, it is an update of rank r + q: `factors` gives these.

    With `use_dora` the updated weight is m · (W + s·B·A) / ‖W + s·B·A‖, the norm taken over all but
    the first dimension and held constant in the backward (Liu et al. 2024, arXiv 2402.09353,
    equation 5 and section 4.3).

    Args:
        weight: W, or the rows of it that `slot` means; shape, device and dtype are used, and for DoRA
            its norms.
        slot: where the update belongs and how W factorizes.
        rank: r, of each group.
        scaling: s.
        dropout: probability of dropping an entry of the branch's input.
        init: as `LoRAConfig.init`.
        use_dora: train magnitudes.
        implementation: as `LoRAConfig.implementation`.
        fixed: q, the rank of the fixed part, of each group; it begins at zero.

    Attributes:
        lora_A: as `slot.factors` says. Float32 for half-precision weights, else of the weight's dtype; it
            stays float32 where the model is made half precision later, as steps of 1e-4 would be lost there.
        lora_B: the same.
        lora_magnitude: (out,) with DoRA, else None.
        lora_fixed_A: F_A, as A with q in the place of r; None where q is 0.
        lora_fixed_B: F_B, the same of B.
        total_rank: r + q.
        begun_from: of an init that is made of the weight, what it was like then (`methods.inits.likeness`);
            None before that.
        makes_factors: whether `factors` makes new tensors.
        becomes_half: follow the model into half precision, where something else keeps float32 values.
    """

    becomes_half = False

    def __init__(
        self,
        weight: Tensor,
        slot: Slot,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        init: str = "default",
        use_dora: bool = False,
        implementation: str = "auto",
        fixed: int = 0,
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.slot, self.rank, self.scaling, self.init = slot, rank, scaling, init
        self.dropout, self.implementation = dropout, implementation
        self.fixed, self.total_rank = fixed, rank + fixed
        self.begun_from: Tensor | None = None
        A, B = slot.factors(tuple(weight.shape), rank)
        self.lora_A = nn.Parameter(torch.empty(A, device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(B, device=weight.device, dtype=dtype))
        self.lora_magnitude = nn.Parameter(self.lora_B.new_empty(weight.shape[0])) if use_dora else None
        # parameters and no buffers: DDP would send these in every forward, FSDP would not shard them
        F_A, F_B = slot.factors(tuple(weight.shape), fixed)
        self.lora_fixed_A = nn.Parameter(self.lora_A.new_empty(F_A), requires_grad=False) if fixed else None
        self.lora_fixed_B = nn.Parameter(self.lora_B.new_empty(F_B), requires_grad=False) if fixed else None
        self.reset_parameters()
        self.reset_magnitude(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of every module (`to`, `half`, `bfloat16`, `to_empty`), but what would be half is float32."""

        def kept(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            if self.becomes_half or made.dtype == tensor.dtype or not _is_half(made):
                return made
            return tensor.to(made.device, torch.float32)

        return super()._apply(kept, recurse)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """With `assign=True` the values of a file take the places of the parameters."""
        for name in () if self.becomes_half else LEAVES:
            if isinstance(stored := state.get(prefix + name), Tensor) and _is_half(stored):
                state[prefix + name] = stored.float()
        super()._load_from_state_dict(state, prefix, *rest)

    def reset_parameters(self) -> None:
        """Begin anew: the update is zero. Called when a model on the meta device is given memory."""
        init_factors(self.lora_A, self.lora_B, self.init, self.slot.zero)
        self.begun_from = None
        for fixed in (self.lora_fixed_A, self.lora_fixed_B):
            if fixed is not None:
                nn.init.zeros_(fixed)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of every module, but the fixed part never trains."""
        for parameter in self.trained():
            parameter.requires_grad_(requires_grad)
        return self

    def trained(self) -> list[nn.Parameter]:
        """A, B and DoRA's magnitude."""
        return [p for name, p in self._parameters.items() if p is not None and name not in FIXED]

    @property
    def makes_factors(self) -> bool:
        return bool(self.fixed)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update, as `slot.factors` says of `total_rank`: the parameters themselves, or
        joined with the fixed part, through which gradients reach A and B."""
        A, B = self._parameters.get("lora_A"), self._parameters.get("lora_B")
        if A is None or B is None:  # under FSDP they are elsewhere
            A, B = self.lora_A, self.lora_B
        if not self.fixed:
            return A, B
        return joined_factors(self.slot, A, B, self.lora_fixed_A, self.lora_fixed_B)  # type: ignore[arg-type]  # both are

    @torch.no_grad()
    def begin_at(self, left: Tensor, right: Tensor, taken_off: bool = False) -> None:
        """Let B·A be left·right.

        Args:
            left: (groups, m, r), as `thin_factors` without the scaling.
            right: (groups, r, k).
            taken_off: let the first r of the fixed part, which there must be, take it off again: the update
                is zero, and A and B are not.
        """
        put_sides(self.slot, left, right, self.lora_A, self.lora_B)
        if taken_off:
            assert self.lora_fixed_A is not None
            assert self.lora_fixed_B is not None
            left, right = (left, -right) if self.slot.transposed else (-left, right)  # F_A = A, F_B = -B
            missing = self.fixed - self.rank
            left, right = F.pad(left, [0, missing]), F.pad(right, [0, 0, 0, missing])
            put_sides(self.slot, left, right, self.lora_fixed_A, self.lora_fixed_B)

    @torch.no_grad()
    def is_zero(self) -> bool:
        """Whether it adds nothing, as at its beginning."""
        r, (left, right) = self.rank, self._sides()
        own, fixed = (left[..., :r], right[:, :r]), (left[..., r:], right[:, r:])
        if not (fixed[0].any() and fixed[1].any()):
            size = own[0].norm() * own[1].norm()  # orthogonal factors have a product of rounding errors
            return bool((own[0] @ own[1]).norm() <= 1e-6 * size)
        sign = -1 if self.slot.transposed else 1  # as in `begin_at`
        taken_off = torch.equal(fixed[0][..., :r], -sign * own[0])
        taken_off = taken_off and torch.equal(fixed[1][:, :r], sign * own[1])
        return taken_off and not fixed[0][..., r:].any()

    def dropped(self, x: Tensor) -> Tensor:
        """x, in train mode with entries dropped."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    @property
    def drops(self) -> float:
        """The probability of dropping now: 0 in eval mode."""
        return self.dropout if self.training else 0.0

    @torch.no_grad()
    def reset_magnitude(self, weight: Tensor) -> None:
        """DoRA's m begins as the norms of the rows of W given."""
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(row_norms(weight.to(self.lora_magnitude.dtype)))

    def thin_factors(self) -> tuple[Tensor, Tensor]:
        """The whole update as two factors by groups, (groups, m, R) and (groups, R, k), R = `total_rank`:
        m is out / groups and k the columns of A; of a transposed slot m is in / groups and k those of B."""
        left, right = self._sides()
        return self.scaling * left, right

    def product(self, weight: Tensor) -> Tensor:
        """s·B·A in the shape of the rows of W given, (out, in / groups, *kernel), in A's dtype."""
        left, right = self.thin_factors()
        if len(left) == 1:  # one matrix product is faster than a batch of one
            return (left[0] @ right[0]).view(weight.shape)
        return torch.bmm(left, right).view(weight.shape)

    def added_to(self, weight: Tensor) -> Tensor:
        """The rows of W given + s·B·A, in one pass over them where it can be."""
        left, right = self._sides()
        if left.shape[0] > 1 or self.lora_magnitude is not None or left.dtype != weight.dtype:
            return weight + self.delta(weight)
        if autocasts(weight.device.type):
            with torch.autocast(weight.device.type, enabled=False):
                return self.added_to(weight)
        return torch.addmm(weight.flatten(1), left[0], right[0], alpha=self.scaling).view(weight.shape)

    def factors_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and s·B in x's dtype, of the shapes of `factors`; where the products with x are in
        float16, shared out so that A·x cannot overflow."""
        down, up, _ = shared_out(*self.factors(), self.scaling, product_dtype(x), self.slot.transposed)
        return down.to(x.dtype), up.to(x.dtype)

    def _sides(self) -> tuple[Tensor, Tensor]:
        """The factors of each group, (groups, rows, r) and (groups, r, columns)."""
        return sides(self.slot, *self.factors(), self.total_rank)

    def delta(self, weight: Tensor) -> Tensor:
        """What this update adds to the rows of W given, in A's dtype."""
        with without_autocast(weight.device.type):
            product = self.product(weight)
            if self.lora_magnitude is None:
                return product
            W = weight.to(product.dtype)
            factors = self.lora_magnitude / row_norms((W + product).detach())
            return (W + product) * factors.view(-1, *[1] * (W.dim() - 1)) - W

    def row_factors(self, weight: Tensor) -> Tensor | None:
        """DoRA's m / ‖W + s·B·A‖, (out,), or None without DoRA."""
        if self.lora_magnitude is None:
            return None
        return row_factors(self.lora_magnitude, weight, *self.factors(), self.scaling)

    def extra_repr(self) -> str:
        fixed = f", fixed={self.fixed}" if self.fixed else ""
        return f"{self.slot.parameter}, rank={self.rank}{fixed}, scaling={self.scaling:g}"


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize < 4


def effective_weight(weight: Tensor, updates: list[LowRankUpdate]) -> Tensor:
    """W + sum of the updates, in W's dtype; the sum is taken in float32 or better and rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    effective = weight.to(dtype)
    for update in updates:
        out_range = update.slot.out_range
        if out_range is None and len(updates) == 1:
            return rounded(update.added_to(effective), weight.dtype)
        delta = update.delta(update.slot.of(weight))
        if out_range is not None:
            below = weight.shape[0] - out_range[1]
            delta = nn.functional.pad(delta, [0, 0] * (weight.dim() - 1) + [out_range[0], below])
        effective = effective + delta
    return rounded(effective, weight.dtype)
