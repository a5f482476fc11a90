"""Frozen normalization: layers whose running statistics stay what they were, through every .train()."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from typing_extensions import Self

from lora_lightning.errors import UserError
from lora_lightning.kernels.common import is_plain
from lora_lightning.kernels.norm import FrozenBatchNormFunction
from lora_lightning.layers.swap import ClassSwap, class_of, swap_class
from lora_lightning.utils.names import by_class

FOLDED = "lora_folded"  # attribute of a tensor
NEVER_TRAIN = {("torchvision.ops.misc", "FrozenBatchNorm2d"): True}


class FrozenNorm(ClassSwap):
    """Mixin for a norm layer that stays in eval mode: it uses its running statistics and keeps them."""

    prefix = "Frozen"

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class Folded:
    """What a convolution leaves on its output for the norm that its weight has done the work of already.

    Attributes:
        norm: who is to take it.
        taken: whether it did.
    """

    def __init__(self, norm: nn.Module, message: str) -> None:
        self.norm, self.message, self.taken = norm, message, False

    def check(self, gradient: Tensor) -> None:
        """A hook of the output: in the backward it is known where that went.

        Raises:
            UserError: not to the norm.
        """
        if not self.taken:
            raise UserError(self.message)


def arrived(norm: nn.Module, x: Tensor) -> bool:
    """Whether x is normalized already; it is taken."""
    folded: Folded | None = getattr(x, FOLDED, None)
    if folded is None or folded.norm is not norm:
        return False
    folded.taken = True
    delattr(x, FOLDED)
    return True


class FrozenAffine(FrozenNorm):
    """A norm that never trains, as torchvision's FrozenBatchNorm2d of detectors, where it may be folded."""

    def forward(self, x: Tensor) -> Tensor:
        return x if arrived(self, x) else super().forward(x)


class FrozenBatchNorm(FrozenNorm):
    """BatchNorm that saves nothing for the backward where its affine is frozen too; the outputs are
    those of the base class bit for bit.

    Attributes:
        behind: names of the modules that the base class's forward calls on the normalized values.
    """

    behind: tuple[str, ...] = ()

    if TYPE_CHECKING:
        running_mean: Tensor
        running_var: Tensor
        weight: Tensor | None
        bias: Tensor | None
        eps: float

        def _check_input_dim(self, x: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if not arrived(self, x):
            trains = any(t is not None and t.requires_grad for t in (self.weight, self.bias))
            saves = torch.is_grad_enabled() and x.requires_grad
            if trains or not saves or not is_plain(x, self.weight):
                return super().forward(x)
            self._check_input_dim(x)
            y = FrozenBatchNormFunction.apply(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
            )
        for name in self.behind:
            y = getattr(self, name)(y)
        return y


class FrozenBatchNormAct(FrozenBatchNorm):
    """timm's BatchNormAct2d: a BatchNorm with a dropout and an activation behind."""

    behind = ("drop", "act")


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
    if "norm" not in type(module).__name__.lower():
        return False
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.dim() <= 1 for p in own)


def is_foldable(module: nn.Module) -> bool:
    """Whether it is a frozen BatchNorm whose work a convolution before it may do: one that was frozen here,
    or torchvision's FrozenBatchNorm2d."""
    return isinstance(module, (FrozenBatchNorm, FrozenAffine)) or bool(by_class(module, NEVER_TRAIN))


def freeze_statistics(module: nn.Module, implementation: str = "auto") -> None:
    """Keep a norm layer in eval mode from now on; calling it twice changes nothing.

    Args:
        implementation: "reference" leaves the layer its own backward.
    """
    if not isinstance(module, FrozenNorm):
        swap_class(module, FrozenNorm if implementation == "reference" else _frozen_family(module))
    module.eval()


def _frozen_family(module: nn.Module) -> type[FrozenNorm]:
    """By the class whose forward the module has."""
    if class_of(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return FrozenBatchNorm
    timm = type(module).__module__.startswith("timm.") and type(module).__name__ == "BatchNormAct2d"
    return FrozenBatchNormAct if timm else FrozenNorm
