"""What the first training steps of an adapted model show: which updates are used, and by finite gradients."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.verify import gradient_peaks
from lora_lightning.utils.tables import truncate_list


class GradientMonitor:
    """What the first training steps show: is every update used, and is its gradient finite?

    One step is not enough to tell: LayerDrop, several optimizers or a gate that begins at zero leave an
    update out of some. Seen alive once, it is alive; a gradient that is not finite is a fault whenever
    it is seen, unless a GradScaler is there to skip the step.

    Args:
        model: the module that was given to `inject`.
        steps: how many training steps are watched.

    Attributes:
        observed: training steps seen so far.
    """

    def __init__(self, model: nn.Module, steps: int = 5) -> None:
        self.model, self.steps, self.observed = model, steps, 0
        self._best: dict[str, float | None] = {}
        self._broken: dict[str, None] = {}
        self._fresh = False
        self._reached: set[int] | None = None

    def before_terms(self, loss: Tensor) -> None:
        """Note to which parameters the module's own loss leads, before terms of the weights are added."""
        self._reached = leaves_of(loss)

    def after_backward(self, scaled: bool = False) -> None:
        """Look at the gradients. `scaled`: a GradScaler looks after those that are not finite."""
        self._fresh = True
        for name, peak in gradient_peaks(self.model, self._reached).items():
            if peak is not None and not math.isfinite(peak) and not scaled:
                self._broken[name] = None
            if not self._best.get(name):  # None, then 0, then alive
                self._best[name] = peak if peak is not None else self._best.get(name)

    def after_step(self) -> bool:
        """Count a step, if it had a backward; true when enough were seen."""
        self.observed += self._fresh
        self._fresh = False
        return self.observed >= self.steps

    def faults(self) -> list[str]:
        """One line for each thing that is wrong: how many layers, which, and why that usually happens."""
        unused = [n for n, peak in self._best.items() if peak is None]
        zero = [n for n, peak in self._best.items() if peak == 0]
        broken, faults = list(self._broken), []
        when = f"in the first {self.observed} training steps"
        if unused:
            faults.append(f"{self._some(unused)} got no gradient {when}: {_listed(unused)}. {UNUSED}")
        if zero:
            faults.append(f"{self._some(zero)} got a gradient of zero alone {when}: {_listed(zero)}. {ZERO}")
        if broken:
            faults.append(
                f"{self._some(broken)} got a gradient with NaN or infinity {when}: {_listed(broken)}. "
                f"{BROKEN}"
            )
        return faults

    def _some(self, names: list[str]) -> str:
        return f"{len(names)} of {len(self._best)} adapted layers"


def leaves_of(loss: Tensor) -> set[int]:
    """Identities of the parameters to which the graph of a loss leads."""
    found: set[int] = set()
    seen = {loss.grad_fn}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):  # where a gradient is accumulated
            found.add(id(node.variable))
        after = {following for following, _ in getattr(node, "next_functions", ())} - seen
        seen |= after
        waiting += after
    return found


def _listed(names: list[str]) -> str:
    return truncate_list(names, most=8)


UNUSED = (
    "Either the forward does not use them (the layer is never called, its parent reads another weight, "
    "LayerDrop skipped it each time, the updates are merged), or their output does not reach the loss (it "
    "is detached, computed under no_grad, or left out of the loss). Name them in exclude_modules, or mend "
    "the forward."
)
ZERO = (
    "The forward uses them, but they do not change the loss: a gate or mask of zero, or an activation "
    "that is off for every input, lies behind them. Name them in exclude_modules if that stays so."
)
BROKEN = (
    "The loss overflowed or is NaN. Look at the batch and the loss, lower the learning rate or clip the "
    "gradients; in half precision prefer bf16-mixed to 16-true."
)
