"""Frozen normalization: layers whose running statistics stay what they were, through every .train()."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from typing_extensions import Self

from lora_lightning.layers.swap import Swapped, swap_in


class FrozenNorm(Swapped):
    """Mixin for a norm layer that stays in eval mode: it uses its running statistics and keeps them."""

    prefix = "Frozen"

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def has_statistics(module: nn.Module) -> bool:
    """Whether train mode moves running statistics: BatchNorm of every kind, tracking InstanceNorm; and
    spectral norm, whose singular vectors are iterated."""
    return isinstance(module, _SpectralNorm) or (
        isinstance(module, _NormBase) and bool(module.track_running_stats)
    )


def is_norm(module: nn.Module) -> bool:
    """A normalization layer: torch's own, or a class named so that holds vectors alone."""
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return True
    named = "norm" in type(module).__name__.lower()
    own = list(module.parameters(recurse=False))
    return named and bool(own) and all(p.dim() <= 1 for p in own)


def freeze_statistics(module: nn.Module) -> None:
    """Keep a norm layer in eval mode from now on; calling it twice changes nothing."""
    if not isinstance(module, FrozenNorm):
        swap_in(module, FrozenNorm)
    module.eval()
