"""What data say of a weight, as a spectrum: the second moments of a layer's inputs, gathered batch by batch,
and the gradient of the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.errors import UserError

EXACT = 1024  # columns, up to which the whole matrix of second moments is kept
SKETCH = 512  # columns of what is kept of a larger one
PROBES = 20  # the seed of the sketch's probes: the same in every run and process


@dataclass(frozen=True)
class Spectrum:
    """Singular values and vectors of a matrix for each group of a weight, the largest first.

    Attributes:
        energies: the singular values squared, (groups, k).
        right: (groups, k, columns), orthonormal rows.
        total: ‖matrix‖² of each group, (groups,).
        left: (groups, rows, k), orthonormal columns; None of inputs, whose rows are too many to keep.
    """

    energies: Tensor
    right: Tensor
    total: Tensor
    left: Tensor | None = None

    def shares(self) -> list[float]:
        """The share of the whole that each component explains, the groups taken together: the explained
        variance ratio where the matrix is of inputs."""
        whole = self.total.sum().clamp_min(torch.finfo(self.total.dtype).tiny)
        found: list[float] = (self.energies.sum(0) / whole).tolist()
        return found


class Moments:
    """XᵀX of the rows X that a layer's weight is multiplied with, summed over batches.

    Its eigenvectors are the right singular vectors of X, as an incremental SVD of X finds them (Ross et al.
    2008; Paischer et al. 2024, arXiv 2410.07170, section 3), without an error that builds up. Of more than
    `EXACT` columns XᵀX·Ω is kept, with orthonormal probes Ω, from which Nyström's approximation gives the
    leading ones (Tropp et al. 2017, arXiv 1706.05736, algorithm 3): exact up to a rank of `SKETCH`.

    Args:
        columns: of X.
        groups: each has its own X.
        rank: the most components that will be asked for.
    """

    def __init__(self, columns: int, groups: int = 1, rank: int = 1) -> None:
        self.columns, self.groups, self.rows = columns, groups, 0
        self.width = max(SKETCH, 2 * rank)
        self.probes: Tensor | None = None
        self.product: Tensor | None = None  # (groups, columns, columns), or (groups, columns, width)
        self.total: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in rows of (groups, T, columns)."""
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
            if self.product is None or self.total is None:
                self.product, self.total = self._begin(rows)
            self.product += rows.mT @ (rows if self.probes is None else rows @ self.probes)
            self.total += rows.square().sum((1, 2))
        self.rows += rows.shape[1]

    def _begin(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        width = self.columns
        if self.columns > max(EXACT, self.width):
            width = self.width
            numbers = torch.Generator().manual_seed(PROBES)
            drawn = torch.randn(self.columns, width, generator=numbers, dtype=torch.float64)
            self.probes = torch.linalg.qr(drawn).Q.to(rows.device, rows.dtype)
        return rows.new_zeros(self.groups, self.columns, width), rows.new_zeros(self.groups)

    @torch.no_grad()
    def spectrum(self) -> Spectrum:
        """Of X.

        Raises:
            UserError: some input was not finite.
        """
        if self.product is None or self.total is None:
            raise ValueError("no rows were added")
        if not torch.isfinite(self.total).all():
            raise UserError("its inputs hold NaN or infinity: look at the data")
        product = self.product.double()
        if self.probes is None:
            energies, vectors = torch.linalg.eigh((product + product.mT) / 2)
            energies, vectors = energies.flip(-1).clamp_min(0), vectors.flip(-1)
        else:
            energies, vectors = _nystrom(product, self.probes.double())
        return Spectrum(energies, signed(vectors).mT.contiguous(), self.total.double())


def _nystrom(product: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the approximation M·Ω·(Ωᵀ·M·Ω)⁻¹·(M·Ω)ᵀ, from M·Ω; with M a little
    shifted so that the inverse exists."""
    shift = math.sqrt(len(probes)) * 1e-7 * torch.linalg.matrix_norm(product).clamp_min(1e-30)
    shift = shift.view(-1, 1, 1)
    shifted = product + shift * probes
    core = probes.mT @ shifted
    triangle = torch.linalg.cholesky((core + core.mT) / 2)
    half = torch.linalg.solve_triangular(triangle.mT, shifted, upper=True, left=False)
    left, values, _ = torch.linalg.svd(half, full_matrices=False)
    return (values.square() - shift.view(-1, 1)).clamp_min(0), left


@torch.no_grad()
def spectrum_of(matrices: Tensor) -> Spectrum:
    """Of the matrices (groups, rows, columns) of a gradient, by the eigenvectors of the smaller product of
    the matrix with itself, in float64.

    Raises:
        UserError: an entry is not finite.
    """
    if not torch.isfinite(matrices).all():
        raise UserError("the gradient of its weight holds NaN or infinity: look at the data and the loss")
    matrices = matrices.double()
    wide = matrices.shape[1] <= matrices.shape[2]
    small = matrices if wide else matrices.mT
    energies, vectors = torch.linalg.eigh(small @ small.mT)
    energies, near = energies.flip(-1).clamp_min(0), signed(vectors.flip(-1))
    far = small.mT @ near
    far = far / torch.linalg.vector_norm(far, dim=1, keepdim=True).clamp_min(1e-300)
    left, right = (near, far) if wide else (far, near)
    return Spectrum(energies, right.mT.contiguous(), matrices.square().sum((1, 2)), left)


def signed(vectors: Tensor) -> Tensor:
    """The columns with the sign by which the largest entry of each is positive, alike on every machine."""
    largest = vectors.abs().argmax(-2, keepdim=True)
    signs = vectors.gather(-2, largest).sign()
    return vectors * torch.where(signs == 0, 1, signs)
