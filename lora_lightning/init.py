"""How A and B begin: one of them is zero, so that at injection the outputs stay what they were."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def kaiming(A: Tensor) -> None:
    """Uniform within 1 / sqrt(fan_in), as nn.Linear and PEFT's default begin."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))


def gaussian(A: Tensor) -> None:
    """Normal with standard deviation 1 / r, PEFT's `init_lora_weights="gaussian"`."""
    nn.init.normal_(A, std=1 / A.shape[0])


INITS: dict[str, Callable[[Tensor], None]] = {"default": kaiming, "gaussian": gaussian}


@torch.no_grad()
def init_update(A: Tensor, B: Tensor, init: str, zero: str = "B") -> None:
    """Fill B with zeros and A by the method named.

    With `zero="A"` it is A that is zero and B normal, as PEFT begins embeddings: rows of the table
    that training never sees then keep their values.
    """
    if zero == "A":
        A.zero_()
        nn.init.normal_(B)
    else:
        INITS[init](A)
        B.zero_()
