"""Where the custom autograd functions step aside for plain autograd."""

from __future__ import annotations

import torch


def plain_autograd_wanted() -> bool:
    """Whether something looks into the operations: compiling or tracing, torch.func, forward-mode."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
