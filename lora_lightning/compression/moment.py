"""The second moments of a layer's inputs, with which the error of an output is the error of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.methods.moments import Moments

WHOLE = 4608  # columns, up to which the whole matrix is kept: a 3×3 kernel over 512 channels
LEADING = 512  # components that are kept of a larger one
FLOOR = 1e-6  # of the mean moment, in directions that the data do not show


class Moment:
    """C = E[x xᵀ] of the inputs x of a weight, as a product with it. Without data C is the identity.

    Attributes:
        matrix: C, (columns, columns) in float64; None without data, or of more than `WHOLE` columns.
    """

    def __init__(self, seen: Moments | None = None) -> None:
        self.matrix: Tensor | None = None
        self.vectors: Tensor | None = None  # (k, columns), the leading ones of a larger matrix
        self.diagonal: Tensor | None = None  # (columns,), of rows that are looked up
        if seen is None:
            return
        if seen.probes is None:
            assert seen.product is not None
            product = seen.product[0].double()
            mean = (product.diagonal().mean() * FLOOR).clamp_min(torch.finfo(torch.float64).tiny)
            self.matrix = (product + product.mT) / 2
            self.matrix.diagonal().add_(mean)
        else:
            found = seen.spectrum()
            self.vectors, self.values = found.right[0][:LEADING], found.energies[0][:LEADING]
            rest = (found.total[0] - self.values.sum()).clamp_min(0)
            self.rest = rest / (seen.columns - len(self.values)) + self.values.mean() * FLOOR

    @classmethod
    def of_counts(cls, counts: Tensor) -> Moment:
        """Of rows of a table that are looked up, by how often; each once more, so that none is forgotten."""
        found = cls()
        found.diagonal = counts.double() + 1
        return found

    @property
    def whole(self) -> bool:
        """Whether every entry of C is known: without data, or of few enough columns."""
        return self.vectors is None

    def times(self, rows: Tensor) -> Tensor:
        """rows · C, of (m, columns)."""
        if self.vectors is not None:
            inner = rows @ self.vectors.mT
            return (inner * (self.values - self.rest)) @ self.vectors + self.rest * rows
        if self.diagonal is not None:
            return rows * self.diagonal
        return rows if self.matrix is None else rows @ self.matrix

    def gram(self, rows: Tensor) -> Tensor:
        """rows · C · rowsᵀ, (m, m)."""
        return self.times(rows) @ rows.mT
