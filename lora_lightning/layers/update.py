"""LowRankUpdate: the matrices A and B of one weight, their scaling, and what they add to the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.init import init_update


class LowRankUpdate(nn.Module):
    """The update s·B·A of one weight W (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    With `use_dora` the updated weight is m · (W + s·B·A) / ‖W + s·B·A‖, the norm taken over all but
    the first dimension and held constant in the backward (Liu et al. 2024, arXiv 2402.09353,
    equation 5 and section 4.3).

    Args:
        weight: W, (out, in, *kernel); its shape, device and dtype are used, and for DoRA its norms.
        rank: r.
        scaling: s.
        dropout: probability of dropping an entry of the branch's input.
        init: a key of `lora_lightning.init.INITS`.
        use_dora: train magnitudes.

    Attributes:
        lora_A: (r, in, *kernel). Float32 for half-precision weights, else of the weight's dtype.
        lora_B: (out, r).
        lora_magnitude: (out,) with DoRA, else None.
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        init: str = "default",
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.empty(rank, *weight.shape[1:], device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(weight.shape[0], rank, device=weight.device, dtype=dtype))
        init_update(self.lora_A, self.lora_B, init)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_magnitude = nn.Parameter(_row_norms(weight.detach().to(dtype))) if use_dora else None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        """What this update adds to W: (out, in, *kernel) -> the same shape, in A's dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            W = weight.to(self.lora_A.dtype)
            update = (self.scaling * self.lora_B @ self.lora_A.flatten(1)).view(W.shape)
            if self.lora_magnitude is None:
                return update
            factors = self.lora_magnitude / _row_norms((W + update).detach())
            return (W + update) * factors.view(-1, *[1] * (W.dim() - 1)) - W

    def row_factors(self, weight: Tensor) -> Tensor | None:
        """DoRA's m / ‖W + s·B·A‖, (out,), or None without DoRA."""
        if self.lora_magnitude is None:
            return None
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            W = weight.to(self.lora_A.dtype)
            norms = _row_norms(W + (self.scaling * self.lora_B @ self.lora_A.flatten(1)).view(W.shape))
        return self.lora_magnitude / norms

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"


def _row_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)
