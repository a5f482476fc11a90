"""The best approximations of lower rank: singular value decompositions by groups, and which ranks to keep."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 128  # the side up to which LAPACK's decomposition is as fast as that of the Gram matrix
OVERSAMPLED = 8  # columns of a sketch beyond twice the rank
DEPTH = 4  # blocks of a Krylov space
NOTHING = 1e-12  # part of the energy that no float32 update holds: a relative error of 1e-6


@dataclass(frozen=True)
class Decomposed:
    """Singular vectors and values of a matrix by groups, largest first; all of them, or the leading ones.

    Attributes:
        left: (groups, m, n).
        values: (groups, n).
        right: (groups, n, k).
        rest: Σσ² of those that are not here.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    rest: float = 0.0

    @property
    def gains(self) -> list[float]:
        """The energy that each rank adds, Σσ² over the groups, largest first."""
        found: list[float] = self.values.square().sum(0).tolist()
        return found

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole matrix."""
        return float((sum(self.gains) + self.rest) ** 0.5)

    def error(self, rank: int) -> float:
        """‖M - M_r‖ / ‖M‖ (Frobenius) of the best approximation of this rank; 0 of a zero matrix."""
        gains = self.gains
        lost, whole = sum(gains[rank:]) + self.rest, sum(gains) + self.rest
        return float((lost / whole) ** 0.5) if whole else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """M_r as (groups, m, r) times (groups, r, k), both with the roots of the singular values: the
        balance of factors that have trained, in which their L2 norm is least."""
        root = self.values[:, :rank].sqrt()
        return self.left[:, :, :rank] * root[:, None], root[:, :, None] * self.right[:, :rank]


@torch.no_grad()
def decomposed(matrix: Tensor, rank: int | None = None) -> Decomposed:
    """The decomposition of a dense matrix (groups, m, k), taken in float64.

    A small one by LAPACK. A larger one by the eigenvalues of its Gram matrix, of the shorter side: two to six
    times as fast, and in float64 as exact as LAPACK's in float32. Where few ranks are asked for, by a block
    Krylov space (Musco & Musco 2015, arXiv 1504.05477, algorithm 2): ten times as fast again. Its error is
    that of the best approximation to 1e-6 of itself where the spectrum falls, to 0.1 % on white noise.

    Args:
        rank: how many singular values will be used; None is all of them.
    """
    wide = matrix.double()
    side = min(wide.shape[1:])
    columns = OVERSAMPLED + 2 * (rank or side)
    if side <= SMALL:
        U, S, V = torch.linalg.svd(wide, full_matrices=False)
        return Decomposed(U, S, V)
    if columns * DEPTH > side:
        return Decomposed(*_by_gram(wide))
    basis = _krylov(wide, columns)
    U, S, V = _by_gram(basis.mT @ wide)
    return Decomposed(basis @ U, S, V, max(0.0, (wide.square().sum() - S.square().sum()).item()))


@torch.no_grad()
def decomposed_product(left: Tensor, right: Tensor) -> Decomposed:
    """The decomposition of left·right, (groups, m, r) times (groups, r, k), which is never formed: through
    the QR decompositions of the factors its singular values are those of an r × r matrix. What rounding
    leaves of factors that take each other off is zero."""
    Q, R = torch.linalg.qr(left.double())
    P, T = torch.linalg.qr(right.double().mT)
    U, S, V = torch.linalg.svd(R @ T.mT, full_matrices=False)
    size = torch.linalg.matrix_norm(R) * torch.linalg.matrix_norm(T)
    S = torch.where(1e-13 * size[:, None] < S, S, 0.0)
    return Decomposed(Q @ U, S, V @ P.mT)


def _by_gram(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ and Vᵀ from the eigenvectors of the Gram matrix of the shorter side."""
    if matrix.shape[1] > matrix.shape[2]:
        V, S, U = _by_gram(matrix.mT)
        return U.mT, S, V.mT
    squares, U = torch.linalg.eigh(matrix @ matrix.mT)
    S, U = squares.flip(-1).clamp_min(0).sqrt(), U.flip(-1)
    rows = U.mT @ matrix  # σ·Vᵀ
    S = torch.where(1e-8 * S[:, :1] < S, S, 0.0)  # what is left below is rounding
    return U, S, rows * torch.where(S > 0, 1 / S, 0.0)[..., None]


def _krylov(matrix: Tensor, columns: int) -> Tensor:
    """An orthonormal basis of M·Ω, (M·Mᵀ)·M·Ω, …, (groups, m, DEPTH·columns). Ω is the same at every call,
    and nobody's random numbers are touched."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(matrix.shape[2], columns, generator=generator, dtype=matrix.dtype)
    block = torch.linalg.qr(matrix @ draw.to(matrix.device)).Q
    basis = block
    for _ in range(DEPTH - 1):
        block = matrix @ (matrix.mT @ block)
        for _ in range(2):  # once leaves rounding errors along the basis
            block = block - basis @ (basis.mT @ block)
        block = torch.linalg.qr(block).Q
        basis = torch.cat([basis, block], dim=2)
    return basis


def rank_by_energy(whole: Decomposed, energy: float) -> int:
    """The smallest rank that keeps this part of Σσ², all of it but what is rounding where it is 1; 0 of a
    zero matrix."""
    gains = whole.gains
    left = sum(gains) + whole.rest
    allowed = max(1 - energy, NOTHING) * left
    for rank, gain in enumerate(gains):
        if left <= allowed:
            return rank
        left -= gain
    return len(gains)


def ranks_by_budget(
    wholes: Mapping[str, Decomposed], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks with at most `budget` parameters in all, chosen over all matrices together for the least energy
    that is lost: the rank that keeps most a parameter is taken next.

    No other choice of as many parameters keeps more, since what ranks add falls within each matrix; where
    what is left of the budget pays for no next rank of the best matrix, others that are cheaper are tried.

    Args:
        costs: parameters of one rank of each.
    """
    ranks = dict.fromkeys(wholes, 0)
    gains = {name: whole.gains[: rank_by_energy(whole, 1.0)] for name, whole in wholes.items()}
    waiting = [(-each[0] / costs[name], name) for name, each in gains.items() if each]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        if costs[name] > budget:
            continue
        budget -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(gains[name]):
            heapq.heappush(waiting, (-gains[name][ranks[name]] / costs[name], name))
    return ranks
