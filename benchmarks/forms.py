"""Updates of other forms than s·B·A, as parametrizations in plain autograd, for `benchmarks.other_forms`.

Each begins with W' = W and has about as many trained parameters as LoRA of rank 4, but for VeRA, whose point
is to have few. W is (out, in, *kernel), or as a matrix (out, k) with k = in · kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor, nn

RANK = 4
VERA_RANK = 256  # of the paper and of PEFT; only vectors train
SCALING = 2.0  # alpha = 2 · rank


def budget(weight: Tensor, rank: int = RANK) -> int:
    """How many parameters LoRA of this rank trains on the weight."""
    out, k = weight.flatten(1).shape
    return rank * (out + k)


def kaiming(*shape: int) -> nn.Parameter:
    """As nn.Linear begins."""
    values = torch.empty(*shape)
    nn.init.kaiming_uniform_(values.flatten(1), a=math.sqrt(5))
    return nn.Parameter(values)


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


class LoRA(nn.Module):
    """W + s·B·A (arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int = RANK) -> None:
        super().__init__()
        out, k = weight.flatten(1).shape
        self.A, self.B = kaiming(rank, k), zeros(out, rank)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SCALING * (self.B @ self.A).view(weight.shape)


class DoRA(LoRA):
    """m · (W + s·B·A) / ‖W + s·B·A‖ by rows, the norm held constant in the backward (arXiv 2402.09353)."""

    def __init__(self, weight: Tensor, rank: int = RANK) -> None:
        super().__init__(weight, rank)
        self.m = nn.Parameter(weight.flatten(1).norm(dim=1))

    def forward(self, weight: Tensor) -> Tensor:
        moved = super().forward(weight).flatten(1)
        return (moved * (self.m / moved.detach().norm(dim=1))[:, None]).view(weight.shape)


class HiRA(LoRA):
    """W + W ∘ (B·A), the product by elements: of high rank (Huang et al., ICLR 2025; PEFT has it)."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + (self.B @ self.A).view(weight.shape))


class Tucker(nn.Module):
    """W + s·B·C·A with A over the channels, (q, in), and a core C, (q, q, *kernel): LoRA of a rank q that is
    higher at as many parameters, for kernels of more than one position (LyCORIS, arXiv 2309.14859)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        out, channels, *kernel = weight.shape
        size = math.prod(kernel)
        rank = max(
            q for q in range(1, 65) if q * (out + channels + q * size) <= max(budget(weight), size * 2)
        )
        self.A, self.C, self.B = kaiming(rank, channels), kaiming(rank, rank, *kernel), zeros(out, rank)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SCALING * torch.einsum("oq,qp...,pi->oi...", self.B, self.C, self.A)


class LoHa(nn.Module):
    """W + (B1·A1) ∘ (B2·A2), each product of half the rank (FedPara, arXiv 2108.06098; LyCORIS)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        out, k = weight.flatten(1).shape
        self.B1, self.A1 = kaiming(out, RANK // 2), kaiming(RANK // 2, k)
        self.B2, self.A2 = zeros(out, RANK // 2), kaiming(RANK // 2, k)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ((self.B1 @ self.A1) * (self.B2 @ self.A2)).view(weight.shape)


class LoKr(nn.Module):
    """W + C ⊗ D, Kronecker's product over out and in, the kernel in D (LyCORIS, arXiv 2309.14859)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        out, channels, *kernel = weight.shape
        rows, columns = self.factors(weight)
        self.C, self.D = zeros(rows, columns), kaiming(out // rows, channels // columns, *kernel)

    @staticmethod
    def factors(weight: Tensor) -> tuple[int, int]:
        """The shape of C with which the parameters come next to LoRA's, the squarest of equal ones."""
        out, channels, *kernel = weight.shape

        def count(rows: int, columns: int) -> int:
            return rows * columns + out // rows * (channels // columns) * math.prod(kernel)

        pairs = product(*([d for d in range(1, 17) if size % d == 0] for size in (out, channels)))
        return min(pairs, key=lambda p: (abs(count(*p) - budget(weight)), abs(p[0] - p[1])))

    def forward(self, weight: Tensor) -> Tensor:
        delta = torch.einsum("ab,oi...->aobi...", self.C, self.D)
        return weight + delta.reshape(weight.shape)


class VeRA(nn.Module):
    """W + diag(b)·B·diag(d)·A; A and B are random, frozen and shared by all layers (arXiv 2310.11454,
    equation 2)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        out, k = weight.flatten(1).shape
        self.out, self.k = out, k
        self.d, self.b = nn.Parameter(torch.full((VERA_RANK,), 0.1)), zeros(out)

    def forward(self, weight: Tensor) -> Tensor:
        A, B = random_factors()
        delta = (self.b[:, None] * B[: self.out]) @ (self.d[:, None] * A[:, : self.k])
        return weight + delta.view(weight.shape)


@lru_cache
def random_factors() -> tuple[Tensor, Tensor]:
    """VeRA's A and B for the largest layer here, by a seed of their own, of PEFT's distribution."""
    made = torch.Generator().manual_seed(0)
    A, B = torch.empty(VERA_RANK, 1152), torch.empty(384, VERA_RANK)
    for matrix in (A, B):
        bound = math.sqrt(6 / matrix.shape[1])
        matrix.uniform_(-bound, bound, generator=made)
    return A, B


class RandLoRA(nn.Module):
    """W + s·Σ_j B_j·Λ_j·A·Γ_j, of full rank by n random frozen products, Λ and Γ diagonal and trained
    (arXiv 2502.00987, equation 4)."""

    scaling = 20.0  # PEFT's alpha / rank

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        out, k = weight.flatten(1).shape
        self.turned, short, long = k > out, min(out, k), max(out, k)
        rank = min(range(1, short + 1), key=lambda r: abs(-(-short // r) * (r + short) - budget(weight)))
        bases = -(-short // rank)
        made = torch.Generator().manual_seed(0)
        self.fixed = (
            (2 * torch.rand(rank, 1, short, generator=made) - 1) * math.sqrt(6 / short),
            (2 * torch.rand(long, rank * bases, generator=made) - 1) * math.sqrt(6 / (rank * bases)),
        )
        self.L = zeros(rank, bases)
        self.G = nn.Parameter(torch.full((bases, short), 1 / long))

    def forward(self, weight: Tensor) -> Tensor:
        A, B = self.fixed
        delta = self.scaling * B @ (self.L[:, :, None] * A * self.G).flatten(0, 1)  # (long, short)
        return weight + (delta.T if self.turned else delta).reshape(weight.shape)


class SSVD(nn.Module):
    """U·(Σ + δ)·G·Vᵀ over the top singular vectors: the right ones turned by an orthogonal G, by Cayley's
    transform of a skew matrix, the left ones kept (arXiv 2509.02830)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.flatten(1)
        size = min(int((math.sqrt(8 * budget(weight) + 1) - 1) / 2), *matrix.shape)
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        self.fixed = U[:, :size], S[:size], V[:size]
        self.skew, self.delta = zeros(size * (size - 1) // 2), zeros(size)
        self.below = tuple(torch.tril_indices(size, size, -1))

    def forward(self, weight: Tensor) -> Tensor:
        U, S, V = self.fixed
        half = torch.zeros(len(S), len(S)).index_put(self.below, self.skew)
        K, one = half - half.T, torch.eye(len(S))
        turned = torch.linalg.solve(one - K, one + K) @ V
        return weight + (U @ ((S + self.delta)[:, None] * turned - S[:, None] * V)).view(weight.shape)


class Full(nn.Module):
    """W + D, everything trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.D = zeros(*weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.D


def smallest(weight: Tensor) -> LoRA:
    """LoRA of rank 1, which has about as few parameters as VeRA."""
    return LoRA(weight, 1)


def less(weight: Tensor) -> DoRA:
    """DoRA of one rank less than LoRA: with the magnitudes no more parameters."""
    return DoRA(weight, RANK - 1)


FORMS: dict[str, Callable[[Tensor], nn.Module]] = {
    "lora": LoRA,
    "hira": HiRA,
    "dora": DoRA,
    "randlora": RandLoRA,
    "ssvd": SSVD,
    "vera": VeRA,
    "lora_1": smallest,
    "tucker": Tucker,
    "dora_3": less,
    "loha": LoHa,
    "lokr": LoKr,
    "full": Full,
}
