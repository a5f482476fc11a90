"""The best product of two matrices for a layer's inputs, which most forms are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_lightning.compression.form import STEP, Rank, Solved, ranks_for
from lora_lightning.compression.moment import Moment


class Product(Solved):
    """W ≈ U·UᵀW, with U the leading eigenvectors of W C Wᵀ: the best of that rank for these inputs."""

    def __init__(self, matrix: Tensor, moment: Moment, step: int = STEP) -> None:
        self.step = step
        self.left, energies = leading(matrix, moment)
        self.right = self.left.mT @ matrix
        self.lost = shares(energies)

    def errors(self) -> Iterator[tuple[Rank, float]]:
        return (((r,), self.lost[r]) for r in ranks_for(len(self.lost) - 1, self.step))

    def error(self, rank: Rank) -> float:
        return self.lost[rank[0]]

    def weights(self, rank: Rank) -> list[Tensor]:
        return list(balanced(self.right[: rank[0]], self.left[:, : rank[0]]))


def leading(matrix: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
    """Eigenvectors (rows, k) and eigenvalues of matrix · C · matrixᵀ, the largest first."""
    turn = None
    if matrix.shape[0] > matrix.shape[1]:
        turn, matrix = torch.linalg.qr(matrix)
    gram = moment.gram(matrix)
    energies, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    vectors = vectors.flip(-1)
    return vectors if turn is None else turn @ vectors, energies.flip(-1).clamp_min(0)


def shares(energies: Tensor) -> list[float]:
    """What the components from the k-th on hold of all, for k = 0 … their number."""
    rest = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    lost: list[float] = (rest / rest[0].clamp_min(torch.finfo(rest.dtype).tiny)).tolist()
    return lost


def balanced(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors whose components are as long in one as in the other, so that both train alike."""
    ratio = torch.linalg.vector_norm(last, dim=0) / torch.linalg.vector_norm(first, dim=1).clamp_min(1e-12)
    scale = torch.where(ratio > 1e6, 1, ratio).sqrt()  # a component that holds nothing stays as it is
    return first * scale[:, None], last / scale
