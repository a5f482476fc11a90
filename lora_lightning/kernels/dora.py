"""DoRA: the rows of W + s·B·A scaled to trained magnitudes m, their norms held constant in the backward
(Liu et al. 2024, arXiv 2402.09353, equation 5 and section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.kernels.common import without_autocast
from lora_lightning.kernels.weights import sum_of


def row_norms(weight: Tensor) -> Tensor:
    """‖row‖ of each output, (d_out,); m / norm is 1 for a row of zeros, not NaN."""
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def row_factors(magnitude: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """c = m / ‖rows of W + s·B·A‖, (d_out,), in A's dtype; W is (d_out, ...)."""
    with torch.no_grad(), without_autocast(weight.device.type):
        norms = row_norms(sum_of(weight, A, B, scaling))
    return magnitude / norms


def scaled_change(c: Tensor, product: Tensor, change: Tensor) -> Tensor:
    """What DoRA adds to f(x, W), given what LoRA adds: c·(f(x, W) + change) - f(x, W).

    Where c is 1, as at the start, it is the change exactly.

    Args:
        c: `row_factors`, of a shape that goes with the product's.
        product: f(x, W) without the bias.
    """
    return (c - 1).to(product.dtype) * product + c.to(product.dtype) * change


Watched = tuple[Tensor, int]


def watched(y: Tensor) -> Watched | None:
    """An output and its version. Saved as an output of an autograd function it could not be changed in place,
    as by ReLU(inplace=True): so it is saved as data, and watched.

    None in inference mode, where tensors have no versions and no backward follows.
    """
    return None if y.is_inference() else (y.detach(), y._version)


def as_it_was(seen: Watched | None) -> bool:
    """Whether nothing has been written into what was watched; False where nothing was."""
    return seen is not None and seen[0]._version == seen[1]


def magnitude_gradient(sums: Tensor, magnitude: Tensor) -> Tensor:
    """dm from dY∘(y - b) summed up for each output, (d_out,), which is m·dm.

    Where m is 0 it is taken for 0: so it is for a row of zeros in W, which is where a magnitude begins at 0.
    """
    return torch.where(magnitude == 0, 0.0, sums / magnitude)
