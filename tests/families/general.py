"""Cases of linear layers and of the general road: parametrized, of another library, a user's own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .case import Case


class Scaled(nn.Module):
    """A user's class with a weight and a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight / 3).t()


class Cosine(nn.Linear):
    """A subclass of a known class with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


class Standardized(nn.Conv2d):
    """A convolution that changes its weight in `_conv_forward`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1), bias)


def timm_layer(name: str, *args: Any, **options: Any) -> nn.Module:
    import timm.layers

    return getattr(timm.layers, name)(*args, **options)


def transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)  # 6 -> 5


GENERAL = {
    "Linear": Case(lambda: nn.Linear(6, 5), ((2, 3, 6),)),
    "Linear-dora": Case(lambda: nn.Linear(6, 5), ((2, 3, 6),), options={"use_dora": True}),
    "Conv1D": Case(transformers_conv1d, ((2, 3, 6),)),
    "StdConv2d": Case(lambda: timm_layer("StdConv2d", 3, 6, 3, padding=1), ((2, 3, 6, 6),)),
    "Conv2dSame": Case(lambda: timm_layer("Conv2dSame", 4, 6, 3, stride=2, groups=2), ((2, 4, 7, 7),)),
    "Conv2dSame-dora": Case(
        lambda: timm_layer("Conv2dSame", 4, 6, 3, stride=2), ((2, 4, 7, 7),), options={"use_dora": True}
    ),
    "weight-norm": Case(lambda: parametrizations.weight_norm(nn.Linear(6, 5)), ((2, 6),)),
    "weight-norm-conv": Case(
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, groups=2, padding=1), dim=2), ((2, 4, 7),)
    ),
    "weight-norm-dora": Case(
        lambda: parametrizations.weight_norm(nn.Linear(6, 5)), ((2, 6),), options={"use_dora": True}
    ),
    "weight-norm-transposed": Case(
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 4, stride=2)), ((2, 4, 5),)
    ),
    "spectral-norm": Case(lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), ((2, 6),)),
    "spectral-norm-conv": Case(lambda: parametrizations.spectral_norm(nn.Conv2d(3, 5, 3)), ((2, 3, 5, 5),)),
    "weight-norm-LSTM": Case(
        lambda: parametrizations.weight_norm(nn.LSTM(5, 6), "weight_hh_l0"), ((4, 2, 5),), batch=1
    ),
    "own-class": Case(Scaled, ((2, 6),)),
    "own-forward": Case(lambda: Cosine(6, 5), ((2, 6),)),
    "own-conv-forward": Case(lambda: Standardized(3, 5, 3), ((2, 3, 5, 5),)),
}
