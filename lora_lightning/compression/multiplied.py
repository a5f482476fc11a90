"""A matrix that is read, as a product of two."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.compression.form import MATRIX_STEP, Form, Layer, Part, Rank, Solved
from lora_lightning.compression.held import Held
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.positions import Positions
from lora_lightning.compression.product import Product


class Multiplied(Form):
    """The matrix as a product that is multiplied out whenever it is read: torch's parametrization by a linear
    layer. It has fewer parameters, and no fewer FLOPs."""

    parameters_alone = "its weight is read: a product has no fewer FLOPs"

    def fits(self, layer: Layer) -> bool:
        return isinstance(layer, Held)

    def full(self, layer: Any) -> Rank:
        return (min(layer.weight.shape),)

    def parts(self, layer: Any, rank: Rank) -> list[Part]:
        out, inner = layer.weight.shape
        return [Part((rank[0], inner), "outputs"), Part((out, rank[0]), "outputs")]

    def flops(self, layer: Any, rank: Rank, where: Positions, batches: int) -> int:
        """As the layer had, and the product once a batch."""
        out, inner = layer.weight.shape
        return where.flops(out * inner, "outputs") + 2 * batches * out * rank[0] * inner

    def modules(self, layer: Any, rank: Rank) -> list[nn.Module]:
        out, inner = layer.weight.shape
        made = {"bias": False, "device": layer.weight.device, "dtype": layer.weight.dtype}
        return [
            nn.utils.skip_init(nn.Linear, inner, rank[0], **made),
            nn.utils.skip_init(nn.Linear, rank[0], out, **made),
        ]

    def solve(self, layer: Any, weight: Tensor, moment: Moment) -> Solved:
        return Product(weight, moment, MATRIX_STEP)
