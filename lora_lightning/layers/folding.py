"""A frozen norm behind an adapted convolution, folded into its weight and bias for a training step:

    norm(conv(x, W') + b) = conv(x, c∘W') + (β - μ·c + c·b),   c = weight / √(variance + eps)

so that it is no pass over the activations, forward or backward. Which norm that is, `adapters.fold` finds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_lightning.kernels.common import is_plain
from lora_lightning.kernels.norm import affine
from lora_lightning.layers.norm import FOLDED, Folded, FrozenAffine, FrozenBatchNorm
from lora_lightning.layers.update import LowRankUpdate

SEE_OUTPUT = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a convolution
SEE_ANY = ("_forward_pre_hooks", *SEE_OUTPUT)  # of a norm


class NormBehind:
    """The norm behind one convolution: nothing but it reads that one's output.

    Args:
        norm: the module.
        message: what to say where the output did not reach it.
    """

    def __init__(self, norm: nn.Module, message: str) -> None:
        self.norm, self.message = norm, message
        self._key: tuple[Any, ...] = ()
        self._kept: tuple[Tensor, ...] = ()
        self._affine: tuple[Tensor, Tensor] | None = None
        self._shifts: dict[torch.dtype, Tensor] = {}

    def folds(self, conv: Any, update: LowRankUpdate) -> bool:
        """Whether it may be done in this step: where the update trains, in train mode, and nobody looks at
        what is between the two."""
        norm: Any = self.norm
        if not (torch.is_grad_enabled() and conv.training and update.lora_B.requires_grad):
            return False
        if not isinstance(norm, (FrozenBatchNorm, FrozenAffine)) or norm.training:
            return False
        own = _tensors(norm)
        if any(t.requires_grad for t in own) or not is_plain(*own):
            return False
        watched = any(getattr(conv, n) for n in SEE_OUTPUT) or any(getattr(norm, n) for n in SEE_ANY)
        return not watched and not _has_any_global_hook()

    def rows(self) -> Tensor:
        """c, (channels,): the same tensor until the norm's have changed."""
        return self._constants()[0]

    def bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What takes the place of the convolution's bias.

        Args:
            dtype: of its products.
        """
        c, shift = self._constants()
        if bias is not None:
            return torch.addcmul(shift, c, bias)
        if dtype not in self._shifts:
            self._shifts[dtype] = shift.to(dtype)
        return self._shifts[dtype]

    def _constants(self) -> tuple[Tensor, Tensor]:
        norm: Any = self.norm
        own = _tensors(norm)
        key = norm.weight is None, *((t.data_ptr(), t._version, t.dtype, t.device) for t in own)
        if self._affine is None or self._key != key:
            with torch.no_grad():
                made = affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
            # their memory is held, so that no other tensor can have it and be taken for them
            self._kept = tuple(t.detach() for t in own)
            self._key, self._affine, self._shifts = key, made, {}
        return self._affine

    def hand_over(self, y: Tensor) -> Tensor:
        """The output, for the norm to take."""
        folded = Folded(self.norm, self.message)
        setattr(y, FOLDED, folded)
        y.register_hook(folded.check)
        return y


def _tensors(norm: Any) -> list[Tensor]:
    return [t for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias) if t is not None]
