"""ReLoRA's restarts (Lialin et al. 2023, arXiv 2307.05695): at which steps, and what one does to an update.

Of W' = W + Σᵢ s·Bᵢ·Aᵢ (equation 1) the paper adds each finished term to W. Here W stays what it is, and the
terms stand side by side in the update's fixed part, which has room for them from the beginning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.layers.factors import init_factors, put_sides, sides
from lora_lightning.layers.update import LowRankUpdate


def restart_steps(restarts: int, steps: int) -> list[int]:
    """After how many of `steps` optimizer steps each restart comes: evenly spread, none after the last."""
    return [steps * i // (restarts + 1) for i in range(1, restarts + 1)]


def first_place(update: LowRankUpdate, restarts: int) -> int:
    """Column of the fixed part at which the room for the terms of so many restarts begins; what stands before
    it is the init's. Below 0 where there is no room."""
    return update.fixed - restarts * update.rank


@torch.no_grad()
def restarts_done(update: LowRankUpdate, restarts: int) -> int:
    """How many places for terms are taken: the first that is zero is free. An update that has trained has
    a factor that is not zero."""
    first = first_place(update, restarts)
    if not restarts or first < 0:
        return restarts
    left, right = sides(update.slot, *_fixed(update), update.fixed)
    terms = range(first, update.fixed, update.rank)
    taken = [bool(left[..., i : i + update.rank].any() or right[:, i : i + update.rank].any()) for i in terms]
    return (*taken, False).index(False)


@torch.no_grad()
def restart_update(update: LowRankUpdate, place: int, init: str) -> None:
    """Put B·A into the fixed part, from this column on, and begin A and B anew: B at zero and A random, as by
    this init or, where it is made of the weight or of data, by the default; the sum is what it was.

    The random numbers are drawn on the CPU, so that they are the same on every device.
    """
    end = place + update.rank
    own = sides(update.slot, update.lora_A, update.lora_B, update.rank)
    fixed_A, fixed_B = _fixed(update)
    left, right = (side.clone() for side in sides(update.slot, fixed_A, fixed_B, update.fixed))
    left[..., place:end], right[:, place:end] = own
    put_sides(update.slot, left, right, fixed_A, fixed_B)
    A, B = (torch.empty_like(factor, device="cpu") for factor in (update.lora_A, update.lora_B))
    init_factors(A, B, init, update.slot.zero)
    update.lora_A.copy_(A)
    update.lora_B.copy_(B)


def _fixed(update: LowRankUpdate) -> tuple[Tensor, Tensor]:
    assert update.lora_fixed_A is not None
    assert update.lora_fixed_B is not None
    return update.lora_fixed_A, update.lora_fixed_B
