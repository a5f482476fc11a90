"""How much of an update of a given size is left behind each way of rounding, without any training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rounding_forms import HALF, Rounder, effective, units
from lora_lightning.kernels.linear_form import plain

SIZES = tuple(2.0**k for k in range(-6, 5))  # medians of |s·B·A| in units of W's last place
WIDTH, TOKENS, RANK = 384, 512, 16
CASES = (
    "branch",
    "exact",
    "nearest",
    "stochastic",
    "nearest, float32 W",
)  # one use of a dither is stochastic


@torch.no_grad()
def survival() -> list[dict[str, Any]]:
    """A row for each case and size of D = s·B·A, with W, X, A and B normal.

    weight: the share of D that is left in the rounded weight, <W' - W, D> / <D, D>; 1 in a branch.
    output: the share of X·Dᵀ that is left in the outputs, which are bfloat16, with and without the update.
    error: ‖Y - X·(W + D)ᵀ‖ as a multiple of what rounding Y alone causes.
    """
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(s, generator=generator) for s in ((WIDTH, WIDTH), (RANK, WIDTH), (WIDTH, RANK)))
    X = torch.randn(TOKENS, WIDTH, generator=generator).to(HALF)
    W /= WIDTH**0.5
    half, rows = W.to(HALF), []
    B /= ((B @ A).abs() / units(half)).median()
    for case in CASES:
        base = W if case.endswith("float32 W") else half
        without = F.linear(X, base.to(HALF)).float()
        for size in SIZES:
            D = size * B @ A
            right = X.double() @ (base.double() + D).t()
            if case == "branch":
                left, Y = 1.0, plain(X, half, None, A, B, None, size, X)
            else:
                merged = effective(base, A, B, size, Rounder(case.partition(",")[0]))
                left = share(merged.float() - base.to(HALF).float(), D)
                Y = F.linear(X.to(merged.dtype), merged).to(HALF)
            output = share(Y.float() - without, X.float() @ D.t())
            error = ((Y - right).norm() / (right.to(HALF) - right).norm()).item()
            rows.append({"case": case, "size": size, "weight": left, "output": output, "error": error})
    return rows


def share(found: Tensor, right: Tensor) -> float:
    """<found, right> / <right, right>: how much of `right` is in `found`."""
    return ((found * right).sum() / right.square().sum()).item()
