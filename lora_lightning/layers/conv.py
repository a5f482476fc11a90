"""LoRA for convolutions of 1, 2 and 3 dimensions, and for transposed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from lora_lightning.kernels.common import product_dtype
from lora_lightning.kernels.conv_products import CONVOLUTIONS
from lora_lightning.kernels.functional import lora_conv
from lora_lightning.kernels.merge_whole import FactoredKernel
from lora_lightning.kernels.together import Factors
from lora_lightning.layers.branch import BranchLayer
from lora_lightning.layers.folding import NormBehind
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LowRankUpdate

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_slot(module: Any) -> Slot:
    """Per-group factors; for a depthwise convolution, whose groups are vectors, one factorization of
    the (out, k·k) matrix across the channels."""
    depthwise = module.groups == module.in_channels
    return Slot("weight", groups=1 if depthwise else module.groups)


def transposed_slot(module: Any) -> Slot:
    """W is (in, out / groups, *kernel): A reduces the input, B makes the output."""
    return Slot("weight", groups=module.groups, transposed=True)


class _Convolution(BranchLayer):
    if TYPE_CHECKING:
        groups: int
        kernel_size: tuple[int, ...]

    @property
    def channel_dim(self) -> int:  # type: ignore[override]  # elsewhere a constant
        return -1 - len(self.kernel_size)

    def _pointwise(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """A convolution with a 1×1 kernel: weight is (out, in / groups)."""
        dimensions = len(self.kernel_size)
        return CONVOLUTIONS[dimensions](x, weight.view(*weight.shape, *[1] * dimensions), groups=groups)


class LoRAConv(_Convolution):
    """conv(x, W) + s·B·conv(x, A): A is a convolution to r channels a group, B a 1×1 one; stride,
    padding and dilation are the layer's own.

    x is (batch, in, *size), A is (groups·r, in / groups, *kernel), B is (out, r); merged, W + s·B·A
    with A flattened, group by group, as in PEFT for one group.
    """

    if TYPE_CHECKING:
        in_channels: int
        lora_norm: NormBehind | None
        stride: tuple[int, ...]
        padding: str | int | tuple[int, ...]
        padding_mode: str
        dilation: tuple[int, ...]
        _reversed_padding_repeated_twice: list[int]

        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        update, own = self.alone(), self._parameters
        weight = own.get("weight")
        if update is None or weight is None or "bias" not in own:  # under FSDP they are elsewhere
            return self._several(x, *self.parts("weight"))
        norm = self.lora_norm
        if norm is None or x.dim() != weight.dim() or not self._folds(norm, update):
            return self._one(x, weight, own["bias"], update)
        bias = norm.bias(own["bias"], product_dtype(x))
        return norm.hand_over(self._one(x, weight, bias, update, norm.rows()))

    def factored(self) -> tuple[Factors, float] | None:
        given, norm, update = super().factored(), self.lora_norm, self.alone()
        if given is None or update is None or update.drops or update.implementation == "reference":
            return None  # a branch
        rows = norm.rows() if norm is not None and self._folds(norm, update) else None
        weight, A, B, magnitude, *_ = given[0]
        return FactoredKernel(weight, A, B, magnitude, rows), given[1]

    def _folds(self, norm: NormBehind, update: LowRankUpdate) -> bool:
        return norm.folds(self, update) and not (update.dropout and self._drops_apart(update))

    def _several(self, x: Tensor, weight: Tensor, updates: list[LowRankUpdate]) -> Tensor:
        if len(updates) == 1:
            return self._one(x, weight, self.bias, updates[0])
        return self.add_branches(x, self._conv_forward(x, weight, self.bias), updates)

    def _drops_apart(self, update: LowRankUpdate) -> bool:
        """Whether there is a dropout, and a padding that is a pass of its own, before which it comes."""
        return update.drops > 0 and (self.padding_mode != "zeros" or isinstance(self.padding, str))

    def _one(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        update: LowRankUpdate,
        rows: Tensor | None = None,
    ) -> Tensor:
        padding = self.padding
        if update.dropout and self._drops_apart(update):
            return self.add_branches(x, self._conv_forward(x, weight, bias), [update])
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode), 0
        return lora_conv(
            x,
            weight,
            bias,
            *update.factors(),
            update.scaling,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            magnitude=update.lora_magnitude,
            dropout=update.dropout if update.training else 0.0,
            implementation=update.implementation,
            rows=rows,
            member=self,
        )

    def branch(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        if update.slot.groups != self.groups:  # depthwise: the update is as small as the weight
            return self._conv_forward(x, update.product(self.base_weight("weight")).to(x.dtype), None)
        down, up = update.factors_for(x)
        h = self._conv_forward(x, down, None)  # groups·r channels
        return self._pointwise(h, up, self.groups)


class LoRAConvTranspose(_Convolution):
    """conv_transpose(x, W) + s·conv_transpose(A·x, B): A is a 1×1 convolution to r channels a group.

    x is (batch, in, *size), W is (in, out / groups, *kernel), A is (groups·r, in / groups), B is
    (groups·r, out / groups, *kernel).
    """

    if TYPE_CHECKING:
        stride: tuple[int, ...]
        padding: tuple[int, ...]
        dilation: tuple[int, ...]

        def _output_padding(self, *args: object) -> list[int]: ...

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        weight, updates = self.parts("weight")
        y = self._transpose(x, weight, self.bias, padding)
        for update in updates:
            down, up = update.factors_for(x)
            h = self._pointwise(update.dropped(x), down, self.groups)
            y = y + self._transpose(h, up, None, padding)
        return y

    def _transpose(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
        convolution = TRANSPOSED[len(self.kernel_size)]
        return convolution(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)
