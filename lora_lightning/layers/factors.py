"""The two factors of an update as matrices: by groups, with a fixed part behind, and at their beginning."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_lightning.layers.slot import Slot


def kaiming(A: Tensor) -> None:
    """Uniform within 1 / sqrt(fan_in), as nn.Linear and PEFT's default begin."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))


def gaussian(A: Tensor) -> None:
    """Normal with standard deviation 1 / r, PEFT's `init_lora_weights="gaussian"`."""
    nn.init.normal_(A, std=1 / A.shape[0])


INITS: dict[str, Callable[[Tensor], None]] = {"default": kaiming, "gaussian": gaussian}


@torch.no_grad()
def init_factors(A: Tensor, B: Tensor, init: str, zero: str = "B") -> None:
    """Fill B with zeros and A by the method named; by the default where that makes both of something else.

    With `zero="A"` it is A that is zero and B normal, as PEFT begins embeddings: rows of the table
    that training never sees then keep their values.
    """
    if zero == "A":
        A.zero_()
        nn.init.normal_(B)
    else:
        INITS.get(init, kaiming)(A)
        B.zero_()


def sides(slot: Slot, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a slot as the factors of each group, (groups, m, rank) and (groups, rank, k)."""
    if slot.transposed:  # in / groups rows, out / groups · kernel columns
        return A.reshape(slot.groups, rank, -1).mT, B.reshape(slot.groups, rank, -1)
    return B.reshape(slot.groups, -1, rank), A.reshape(slot.groups, rank, -1)


def put_sides(slot: Slot, left: Tensor, right: Tensor, A: Tensor, B: Tensor) -> None:
    """The inverse of `sides`: write such factors into A and B."""
    down, up = (left.mT, right) if slot.transposed else (right, left)
    A.copy_(down.reshape(A.shape))
    B.copy_(up.reshape(B.shape))


def joined_factors(
    slot: Slot, A: Tensor, B: Tensor, fixed_A: Tensor, fixed_B: Tensor
) -> tuple[Tensor, Tensor]:
    """A and B of a trained and a fixed part together, in each group one behind the other."""
    if slot.groups == 1:
        return torch.cat((A, fixed_A)), torch.cat((B, fixed_B), dim=0 if slot.transposed else 1)

    def by_group(one: Tensor, other: Tensor) -> Tensor:
        parts = [t.unflatten(0, (slot.groups, -1)) for t in (one, other)]
        return torch.cat(parts, dim=1).flatten(0, 1)

    return by_group(A, fixed_A), by_group(B, fixed_B) if slot.transposed else torch.cat((B, fixed_B), dim=1)
