"""ScaledAdamW: AdamW on gradients that are preconditioned by the other factor of each update."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.methods.pairs import Pair, pairs_of
from lora_lightning.utils.sharding import is_flattened, is_sharded

# Without the hooks and the profiler's record that torch has around it, which `step` below has once already.
ADAMW_STEP = inspect.unwrap(torch.optim.AdamW.step)


class ScaledAdamW(torch.optim.AdamW):
    """AdamW on gradients in the metric of low-rank matrices (Zhang and Pilanci 2024, Riemannian
    Preconditioned LoRA, arXiv 2402.02347, Algorithm 1):

        ∇A ← (Bᵀ·B + δ·I)⁻¹ · ∇A,    ∇B ← ∇B · (A·Aᵀ + δ·I)⁻¹

    with both factors as they are before the step: a direction of B·A that does not depend on how it is shared
    out between A and B. It is for the factors that train, of each group of a grouped convolution by itself;
    DoRA's magnitudes, heads, norms and biases are trained as by AdamW.

        def configure_optimizers(self):
            return ll.ScaledAdamW(ll.param_groups(self, lr=1e-3), self)

    The r × r matrices are made and solved in float64, those of the same shape at once. Nothing is kept from
    step to step beyond AdamW's state. `p.grad` is what the backward left, before and after the step.

    Args:
        params: parameters or groups of them, as of `torch.optim.AdamW`.
        module: where the updates are.
        lr: the rate, as of AdamW, and so are the next three.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: per step, times the rate.
        damping: δ.

    Raises:
        ConfigError: no update is in `module`; it is sharded, or on a device without float64.
    """

    def __init__(
        self,
        params: Iterable[Any],
        module: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
    ) -> None:
        pairs = pairs_of(module)
        if problem := _problem(module, pairs, damping):
            raise ConfigError([problem])
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.damping = damping
        self.pairs = pairs

    def __getstate__(self) -> dict[str, Any]:
        """For copies; a checkpoint holds `state_dict()`."""
        return {**super().__getstate__(), "damping": self.damping, "pairs": self.pairs}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after the closure where there is one.

        Args:
            closure: computes the loss again, with its gradients.

        Returns:
            What the closure returns, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with _instead(preconditioned(self.pairs, self.damping)):
            ADAMW_STEP(self)
        return loss


def _problem(module: nn.Module, pairs: list[Pair], damping: float) -> str | None:
    name = f"ScaledAdamW of {type(module).__name__}"
    if damping <= 0:
        return f"damping={damping!r}: give a number above 0; 1e-6 is the paper's."
    if is_sharded(module) or is_flattened(module):
        return f"{name}: its parameters are sharded over processes; take torch.optim.AdamW."
    if any(pair.A.device.type == "mps" for pair in pairs):
        return f"{name}: works in float64, which MPS has not; take torch.optim.AdamW."
    return None if pairs else f"{name}: it has no updates: adapt it first, or take torch.optim.AdamW."


def preconditioned(pairs: Iterable[Pair], damping: float) -> dict[nn.Parameter, Tensor]:
    """The preconditioned gradient of each factor that has one, in the gradient's dtype."""
    alike: dict[Any, list[tuple[Pair, nn.Parameter, nn.Parameter]]] = {}
    for pair in pairs:
        for factor, other in ((pair.A, pair.B), (pair.B, pair.A)):
            if factor.grad is not None:
                shapes = pair.rows(factor, factor).shape, pair.rows(other, other).shape
                alike.setdefault((shapes, factor.device), []).append((pair, factor, other))
    found: dict[nn.Parameter, Tensor] = {}
    for same in alike.values():
        gradients = _stacked([pair.rows(factor.grad, factor) for pair, factor, _ in same])  # type: ignore[arg-type]  # has one
        others = _stacked([pair.rows(other, other) for pair, _, other in same])
        gram = torch.bmm(others, others.mT)  # (n·groups, r, r)
        gram.diagonal(dim1=1, dim2=2).add_(damping)
        solved = torch.cholesky_solve(gradients, torch.linalg.cholesky_ex(gram)[0])
        for (pair, factor, _), rows in zip(same, solved.chunk(len(same)), strict=True):
            found[factor] = pair.unrolled(rows, factor).to(factor.dtype)
    return found


def _stacked(rows: list[Tensor]) -> Tensor:
    """n of (groups, r, columns) as one (n·groups, r, columns) in float64."""
    return torch.cat([r.double() for r in rows])


@contextmanager
def _instead(gradients: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within this context parameters have these gradients."""
    own = {parameter: parameter.grad for parameter in gradients}
    try:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        yield
    finally:
        for parameter, kept in own.items():
            parameter.grad = kept
