"""A linear layer or a convolution by two: the same with fewer outputs, then a linear layer or 1×1.

Eckart and Young's; of a kernel Zhang et al. 2015 (arXiv 1505.06798).
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn

from lora_lightning.compression.convolutions import CONVS, conv, options_of
from lora_lightning.compression.form import MATRIX_STEP, STEP, Form, Layer, Part, Rank, Solved
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.product import Product


class SVD(Form):
    """Two linear layers, or two 1×1 convolutions."""

    def fits(self, layer: Layer) -> bool:
        return isinstance(layer, nn.Linear) or (isinstance(layer, CONVS) and prod(layer.kernel_size) == 1)

    def full(self, layer: Any) -> Rank:
        return (min(layer.weight.flatten(1).shape),)

    def parts(self, layer: Any, rank: Rank) -> list[Part]:
        out, *rest = layer.weight.shape
        ones = (1,) * (len(rest) - 1)
        return [Part((rank[0], *rest), "outputs"), Part((out, rank[0], *ones), "outputs")]

    def modules(self, layer: Any, rank: Rank) -> list[nn.Module]:
        if isinstance(layer, nn.Linear):
            made = {"device": layer.weight.device, "dtype": layer.weight.dtype}
            biased = layer.bias is not None
            return [
                nn.utils.skip_init(nn.Linear, layer.in_features, rank[0], bias=False, **made),
                nn.utils.skip_init(nn.Linear, rank[0], layer.out_features, bias=biased, **made),
            ]
        out, inner = layer.weight.shape[:2]
        return [
            conv(layer, inner, rank[0], options_of(layer)),
            conv(layer, rank[0], out, {"kernel_size": 1}, last=True),
        ]

    def solve(self, layer: Any, weight: Tensor, moment: Moment) -> Solved:
        step = MATRIX_STEP if isinstance(layer, nn.Linear) else STEP
        return Product(weight.flatten(1), moment, step)


class Channel(SVD):
    """The kernel with fewer outputs, then 1×1."""

    def fits(self, layer: Layer) -> bool:
        return isinstance(layer, CONVS) and prod(layer.kernel_size) > 1
