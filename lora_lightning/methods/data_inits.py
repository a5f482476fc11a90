"""How an update begins by data: by the inputs of its layer, or by the gradient of its weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lora_lightning.layers.slot import Slot
from lora_lightning.methods.moments import Spectrum

# left (groups, m, r) and right (groups, r, k), as `LowRankUpdate.begin_at` has them; a side of zeros is thin
Sides = tuple[Tensor, Tensor]
GAMMA = 128  # of LoRA-One: what its authors take


def eva(slot: Slot, rank: int, seen: Spectrum) -> Sides:
    """A = V_rᵀ, the leading right singular vectors of the inputs X = U·S·Vᵀ, and B = 0 (Paischer et al. 2024,
    "One Initialization to Rule them All", arXiv 2410.07170, section 3): B·A·x sees most of x's variance.

    Args:
        seen: of the inputs.
    """
    A = seen.right[:, :rank]
    groups = len(A)
    if slot.transposed:  # A reduces the input of weights that are (in, out)
        return A.mT, A.new_zeros(groups, rank, 1)
    return A.new_zeros(groups, 1, rank), A


def lora_one(slot: Slot, rank: int, seen: Spectrum) -> Sides:
    """With -∇_W L = U·S·Vᵀ: B = U_r·(S_r / (S_1·γ))^½ and A = (S_r / (S_1·γ))^½·V_rᵀ, so that W + s·B·A is W
    after a step of full fine-tuning down the gradient's best approximation of rank r (Zhang et al. 2025,
    arXiv 2502.01235, algorithm 1), whose spectral norm is s / γ. Where the gradient is zero both are.

    Args:
        seen: of the gradient, in groups as in `matrices_of`.
    """
    assert seen.left is not None
    values = seen.energies[:, :rank].sqrt()
    root = (values / (values.max() * GAMMA).clamp_min(1e-300)).sqrt()
    return -seen.left[:, :, :rank] * root.unsqueeze(1), seen.right[:, :rank] * root.unsqueeze(2)


def matrices_of(slot: Slot, weight: Tensor) -> Tensor:
    """The rows of a weight, or of its gradient, as the matrices that B·A approximates: (groups, rows,
    columns)."""
    part = slot.of(weight)
    return part.reshape(slot.groups, part.shape[0] // slot.groups, -1)


BY_DATA: dict[str, Callable[[Slot, int, Spectrum], Sides]] = {"eva": eva, "lora_one": lora_one}
