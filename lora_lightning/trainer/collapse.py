"""Whether a training has collapsed: by its losses, and by the size of the updates beside their weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.state import state_of, update_of
from lora_lightning.layers.registry import LoRALayer
from lora_lightning.methods.pairs import pairs_of
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.strategies import UNSHARDED
from lora_lightning.utils.names import submodule

EVERY = 20  # losses between two looks, each of which waits for the device once
FIRST = 5  # losses whose median is where a training began
PATIENCE = 3  # looks in a row that must find it bad
BEGUN = 5  # looks within which a training has got below where it began
ABOVE = 0.1  # of where it began: less than that is no change
NOISE = 3  # deviations of single losses from their median: what lies within may be chance
LOST = 0.9  # of what a training had gained
DWARFS = 0.5  # ‖s·B·A‖ / ‖W‖, spectral norms, in half of the layers; sound runs reach 1.2
BURIES = 5.0  # the same, where the losses need not be asked
SIZED = 5  # looks between two at the updates, where the losses give no cause
ITERATIONS = 20  # of the power method


@dataclass(frozen=True)
class Look:
    """The losses since the look before, the mean of what the processes have seen.

    Attributes:
        median: of the finite ones; NaN where less than half are finite.
        noise: the median of their absolute deviations from it.
        first: the median of the first `FIRST` of them.
    """

    median: float
    noise: float
    first: float

    @classmethod
    def of(cls, losses: list[float]) -> Look:
        finite = [loss for loss in losses if math.isfinite(loss)]
        if 2 * len(finite) < len(losses) or not finite:
            return cls(math.nan, math.nan, math.nan)
        median = statistics.median(finite)
        noise = statistics.median(abs(loss - median) for loss in finite)
        return cls(median, noise, statistics.median(finite[:FIRST]))


def fault(looks: list[Look], dwarfed: bool) -> str | None:
    """What is wrong with a training of these losses, or None.

    A healthy run may stand still for long (CTC before its first letters), jump (small batches), or grow worse
    (harder pictures from some epoch on), so that what the losses show counts only where the updates have
    outgrown their weights too, unless they are not finite or stay at twice where they began.

    Args:
        dwarfed: whether the updates have outgrown their weights.
    """
    if math.isnan(looks[-1].median):
        return "its loss is not finite"
    if len(looks) < PATIENCE:
        return None
    known = [look for look in looks if not math.isnan(look.median)]
    lately = [look.median for look in looks[-PATIENCE:]]
    chance = NOISE * statistics.median(look.noise for look in known)
    start = looks[0].first
    margin = max(chance, ABOVE * abs(start))
    doubled = all(loss > start + max(margin, abs(start)) for loss in lately)
    if doubled or (dwarfed and all(loss > start + margin for loss in lately)):
        return f"its loss began at {start:.3g} and stays above that, at {lately[-1]:.3g}"
    best = min(look.median for look in known)
    if (
        dwarfed
        and start - best > 2 * margin
        and all(loss > start - (1 - LOST) * (start - best) for loss in lately)
    ):
        return f"its loss had fallen from {start:.3g} to {best:.3g}, and stays at {lately[-1]:.3g}"
    still = all(look.median > start - ABOVE * abs(start) for look in known)
    if dwarfed and still and len(looks) >= BEGUN:
        return f"its loss began at {start:.3g} and stays there, at {lately[-1]:.3g}"
    return None


class CollapseWatch:
    """Looks at the losses of a training every `EVERY` batches, and says when it has collapsed.

    The losses stay on their device between two looks. Every process has the same verdict, since it judges the
    means over all of them. Where the module trains without giving a loss, nothing is seen.

    Args:
        model: the module that was given to `inject`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.looks: list[Look] = []
        self._losses: list[Tensor] = []
        self._batches = 0

    def after_batch(self, outputs: Any, trainer: Any) -> str | None:
        """Take up what a training step gave; what is wrong and what to change, or None."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().float().reshape(()))
        self._batches += 1
        if self._batches % EVERY:
            return None
        self._look(trainer)
        return self._verdict(trainer) if self.looks else None

    def _look(self, trainer: Any) -> None:
        """One look at the losses since the last: the mean over the processes that have any."""
        here = Look.of(torch.stack(self._losses).tolist()) if self._losses else None
        self._losses = []
        values = [0.0] * 4 if here is None else [here.median, here.noise, here.first, 1.0]
        if trainer.world_size > 1:
            shared = torch.tensor(values, device=trainer.strategy.root_device)
            values = trainer.strategy.reduce(shared, reduce_op="sum").tolist()
        if count := values[3]:
            self.looks.append(Look(*(value / count for value in values[:3])))

    def _verdict(self, trainer: Any) -> str | None:
        if fault(self.looks, dwarfed=True) is None and len(self.looks) % SIZED:
            return None
        whole = is_a(trainer.strategy, *UNSHARDED)  # others leave parts of the updates in each process
        sizes = update_sizes(self.model) if whole else {}
        middle = statistics.median(sizes.values()) if sizes else 0.0
        wrong = fault(self.looks, middle > DWARFS)
        if wrong is None and middle > BURIES:
            wrong = "half of its updates are many times larger than their weights"
        return None if wrong is None else _message(wrong, self.model, sizes, trainer)


@torch.no_grad()
def update_sizes(model: nn.Module) -> dict[str, float]:
    """‖s·B·A‖ / ‖W‖ of each active update by its name in the plan, in spectral norms: the most that the
    update and the weight make of an input. A weight of zero, and one that is not finite, is left out."""
    state = state_of(model)
    return {
        planned.name: size
        for adapter in state.active
        for planned in state.adapters[adapter].plan.layers
        if (size := _size(model, planned, adapter)) is not None
    }


def _size(model: nn.Module, planned: LayerPlan, adapter: str) -> float | None:
    layer = cast(LoRALayer, submodule(model, planned.module))
    if adapter not in layer.lora_active:
        return None
    update = update_of(model, planned, adapter)
    weight = update.slot.of(layer.base_weight(update.slot.parameter)).to(torch.float32)
    whole, delta = (_spectral(t.float().flatten(1)) for t in (weight, update.delta(weight)))
    return delta / whole if whole > 0 and math.isfinite(delta / whole) else None


def _spectral(matrix: Tensor) -> float:
    """The largest singular value, by the power method, to a few percent; no random number is drawn."""
    vector = torch.linspace(1, 2, matrix.shape[1], device=matrix.device).cos() + matrix.abs().sum(0)
    for _ in range(ITERATIONS):
        vector = torch.nn.functional.normalize(matrix.mT @ (matrix @ vector), dim=0)
    return float((matrix @ vector).norm())


def _message(wrong: str, model: nn.Module, sizes: dict[str, float], trainer: Any) -> str:
    plan = state_of(model).plan
    ranks = {layer.name: layer.rank for layer in plan.layers}
    rate = rate_of_updates(model, [group for o in trainer.optimizers for group in o.param_groups])
    grown = ""
    if sizes:
        name = max(sizes, key=sizes.__getitem__)
        rank = f" (rank {ranks[name]})" if name in ranks else ""
        grown = (
            f" The update of {name}{rank} is {sizes[name]:.2g} times its weight, more than any other; half "
            f"of the {len(sizes)} are above {statistics.median(sizes.values()):.2g}."
        )
    return (
        f"the training has collapsed at step {trainer.global_step}: {wrong}.{grown} The learning rate of "
        f"{rate:g} is too high here: give about a third, {rate / 3:.1g} (optim.lr in a recipe); or let it "
        "climb for longer (schedule.warmup=0.4), clip the gradients (trainer.gradient_clip_val=1.0), or, "
        "where BatchNorm is frozen and no longer holds the outputs in bounds, let it train "
        "(train_norm='both'). Checkpoints from before are as they were; watch_collapse=False trains on."
    )


def rate_of_updates(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> float:
    """The highest peak rate of an optimizer's groups with some `lora_A`, of all groups where none has one: a
    head may have a rate of its own, and with LoRA+ a `lora_B` a multiple. A scheduler keeps the peak beside
    today's rate."""
    own = {id(pair.A) for pair in pairs_of(model)}
    chosen = [group for group in groups if any(id(p) in own for p in group["params"])]
    return max((float(group.get("initial_lr", group["lr"])) for group in chosen or groups), default=0.0)
