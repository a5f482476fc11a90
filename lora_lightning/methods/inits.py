"""How an update begins where that is made of its weight, or of both factors at once: one function an init.

W is taken by groups, (groups, m, k), as `LowRankUpdate.thin_factors` has its product; s is the scaling. Each
gives the B0, (groups, m, r), and the A0, (groups, r, k), at which the update begins. Where B0·A0 is not zero
(`config.OFF_ZERO`), the update's fixed part takes it off. Data-driven inits are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_lightning.config import OFF_ZERO
from lora_lightning.errors import UserError
from lora_lightning.kernels.common import cast
from lora_lightning.layers.update import LowRankUpdate

ITERATIONS = 16  # of "pissa_fast", as in PEFT's examples (`pissa_niter_16`)
MORE = 8  # columns of its sketch beyond the rank


def pissa(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """B0 = U·√(S/s), A0 = √(S/s)·Vᵀ of the `rank` largest singular values (Meng et al. 2024, arXiv
    2404.02948, equations 2 to 4; the division by s is PEFT's, so that s·B0·A0 is that part of W)."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return _shared(U, S, V, slice(0, rank), scaling)


def pissa_fast(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """As `pissa`, by subspace iteration on a random sketch (Halko et al. 2011, arXiv 0909.4061, algorithms
    4.4 and 5.1). The random numbers are the same everywhere, and none of the program's are taken."""
    groups, m, k = W.shape
    width = min(rank + MORE, m, k)
    sketch = torch.randn(groups, k, width, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(W @ sketch.to(W.device, W.dtype)).Q
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, V = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return _shared(Q @ U, S, V, slice(0, rank), scaling)


def milora(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """As `pissa` of the `rank` smallest singular values (Wang et al. 2024, arXiv 2406.09044, section 3.2)."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return _shared(U, S, V, slice(-rank, None), scaling)


def olora(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The first `rank` columns of Q and rows of R, of W = Q·R (Büyükakyüz 2024, arXiv 2406.01775, section 3);
    what is taken off W is s·B0·A0, as in PEFT."""
    Q, R = torch.linalg.qr(W)
    return Q[..., :rank], R[..., :rank, :]


def orthogonal(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """B0 = Z·Q_e / 10, A0 = (Z'·Q_o)ᵀ / 10 with normal Z and Z', and the odd and even rows Q_o and Q_e of one
    random orthogonal matrix, so that B0·A0 is zero: PEFT's `orthogonal`, also for odd ranks."""
    groups, m, k = W.shape
    Q = torch.linalg.qr(torch.randn(groups, rank, rank).to(W)).Q
    odd, even = Q[:, 0::2], Q[:, 1::2]
    right = (torch.randn(groups, k, odd.shape[1]).to(W) @ odd).mT / 10
    left = torch.randn(groups, even.shape[1], m).to(W).mT @ even / 10
    return left, right


INITS: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "orthogonal": orthogonal,
    "pissa": pissa,
    "pissa_fast": pissa_fast,
    "milora": milora,
    "olora": olora,
}


@torch.no_grad()
def begin(update: LowRankUpdate, weight: Tensor, where: str, padding: int | None = None) -> None:
    """Let an update begin as its init says; one whose init is not of `INITS` stays as it is.

    Nothing is done where it has begun from such a weight already.

    Args:
        weight: W, or the rows of it that the slot means; it may be a QuantizedTensor.
        where: the layer's name, for the message.
        padding: of an embedding, the row that never trains: A0 is zero there.

    Raises:
        UserError: the weight is not finite; the update is as it was.
    """
    begun = update.begun_from
    if update.init not in INITS or (begun is not None and update.init not in OFF_ZERO):
        return
    W = cast(weight.detach(), update.lora_A.dtype)
    now = likeness(W)
    if begun is not None and torch.allclose(begun, now, rtol=1e-6, atol=0):
        return
    if not now.isfinite().all():
        raise UserError(
            f"init={update.init!r}: the weight of {where or 'the model'} holds NaN or infinity, and has no "
            'such beginning: load the base\'s weights first, or set init to "default".'
        )
    W = W.reshape(update.slot.groups, len(W) // update.slot.groups, -1)
    if padding is not None:
        W = W.index_fill(1, torch.tensor([padding], device=W.device), 0)
    left, right = INITS[update.init](W, update.rank, update.scaling)
    left = left if padding is None else _without(left, padding)
    update.begin_at(left, right, taken_off=update.init in OFF_ZERO)
    update.begun_from = now


def likeness(weight: Tensor) -> Tensor:
    """Two numbers by which it is seen, to about six digits, whether a weight is another one: float64, on the
    CPU."""
    flat = weight.flatten(1)
    ramp = torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype, device=flat.device)
    rows = flat @ ramp
    return torch.stack([rows.norm(), (rows * ramp.new_ones(len(rows)).cumsum(0)).norm()]).double().cpu()


def _shared(U: Tensor, S: Tensor, V: Tensor, chosen: slice, scaling: float) -> tuple[Tensor, Tensor]:
    """U·√(S/s) and √(S/s)·Vᵀ of the chosen singular values. Where one is zero, A begins as by default in size
    and B at zero: with both at zero neither would get a gradient."""
    nothing = S[..., chosen] <= torch.finfo(S.dtype).eps * S.amax(-1, keepdim=True)
    root = (S[..., chosen] / scaling).sqrt()
    left = U[..., chosen] * root.masked_fill(nothing, 0)[..., None, :]
    return left, root.masked_fill(nothing, 3**-0.5)[..., None] * V[..., chosen, :]


def _without(left: Tensor, row: int) -> Tensor:
    """Exactly zero in this row, where singular vectors have rounding errors."""
    return left.index_fill(1, torch.tensor([row], device=left.device), 0)
