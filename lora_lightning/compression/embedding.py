"""A table of embeddings by a narrower one and a linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.compression.form import MATRIX_STEP, Form, Part, Rank, Solved
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.product import Product


class Table(Form):
    """Embedding (rows, r), then a linear layer without a bias. A row of zeros, such as that of `padding_idx`,
    stays one; it saves parameters, and costs a product."""

    parameters_alone = "a table of embeddings has no FLOPs"

    def fits(self, layer: Any) -> bool:
        return isinstance(layer, nn.Embedding)

    def full(self, layer: Any) -> Rank:
        return (min(layer.weight.shape),)

    def parts(self, layer: Any, rank: Rank) -> list[Part]:
        rows, wide = layer.weight.shape
        return [Part((rows, rank[0]), "looked up"), Part((wide, rank[0]), "outputs")]

    def modules(self, layer: Any, rank: Rank) -> list[nn.Module]:
        rows, wide = layer.weight.shape
        made = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        kept = {name: getattr(layer, name) for name in ("padding_idx", "scale_grad_by_freq", "sparse")}
        return [
            nn.utils.skip_init(nn.Embedding, rows, rank[0], **kept, **made),
            nn.utils.skip_init(nn.Linear, rank[0], wide, bias=False, **made),
        ]

    def solve(self, layer: Any, weight: Tensor, moment: Moment) -> Solved:
        return Looked(weight.mT, moment)


class Looked(Solved):
    """A table's product, the rows weighed by how often they were looked up."""

    def __init__(self, matrix: Tensor, moment: Moment) -> None:
        self.product = Product(matrix, moment, MATRIX_STEP)

    def errors(self) -> Iterator[tuple[Rank, float]]:
        return self.product.errors()

    def error(self, rank: Rank) -> float:
        return self.product.error(rank)

    def weights(self, rank: Rank) -> list[Tensor]:
        first, last = self.product.weights(rank)
        return [torch.t(first), last]
