"""The restarts of a Trainer's fit: at which of its steps, alike in every process and in a resumed run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.adapters.restarts import done, restart_adapter, updates_of
from lora_lightning.adapters.state import state_of
from lora_lightning.errors import ConfigError
from lora_lightning.methods.restarts import restart_steps
from lora_lightning.trainer.averaging import average_anew
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.ema import EMA
from lora_lightning.trainer.strategies import UNSHARDED
from lora_lightning.utils.rng import seeded

REMEDY = "or set restarts to 0."


@dataclass
class Restarts:
    """The restarts that remain.

    Attributes:
        due: by the adapter, the optimizer steps after which each of all its restarts comes.
        done: by the adapter, how many are behind it.
        seed: of the random numbers in them, the same in every process and in a resumed run.
    """

    due: dict[str, list[int]]
    done: dict[str, int]
    seed: int

    def before_batch(self, trainer: Any, module: pl.LightningModule) -> None:
        """Restart what is due. A checkpoint of the step before is of the time before, and the resumed run
        comes by here, too."""
        for adapter, steps in self.due.items():
            number = self.done[adapter]
            if number < len(steps) and trainer.global_step >= steps[number]:
                self.done[adapter] += 1
                with seeded(self.seed, number, list(self.due).index(adapter)):
                    restart_adapter(module, adapter, *trainer.optimizers)
                _average_anew(trainer, module, adapter)


def restarts_of_fit(trainer: Any, module: pl.LightningModule, seed: int | None) -> Restarts | None:
    """The restarts of a fit that is about to train; None without any. The steps are those of the whole fit,
    also in a run that is resumed.

    Args:
        seed: that of the run that is resumed; None is torch's of the first process.

    Raises:
        ConfigError: their steps cannot be known, or averages or shards are in the way.
    """
    state = state_of(module)
    wanted = {n: r for n in state.active if (r := state.adapters[n].config.restarts)}
    if not wanted:
        return None
    steps = _steps(trainer, module, max(wanted.values()))
    behind = {n: done(module, n) for n in wanted}
    if seed is None and (spent := [n for n, number in behind.items() if number]):
        rank_zero_warn(
            f"restarts={wanted[spent[0]]}: adapter {spent[0]!r} has had {behind[spent[0]]} of them in an "
            "earlier training; this one makes the rest."
        )
    seed = trainer.strategy.broadcast(torch.initial_seed()) if seed is None else seed
    return Restarts({n: restart_steps(r, steps) for n, r in wanted.items()}, behind, seed)


def _steps(trainer: Any, module: pl.LightningModule, restarts: int) -> int:
    """How many optimizer steps the fit takes."""
    asked = f"restarts={restarts}: "
    problems = []
    if not is_a(trainer.strategy, *UNSHARDED):
        problems.append(f"{asked}{type(trainer.strategy).__name__} cuts the factors up; take ddp, {REMEDY}")
    if any(is_a(c, "StochasticWeightAveraging") for c in trainer.callbacks):
        problems.append(
            f"{asked}StochasticWeightAveraging would average factors of different updates: take "
            f"lora_lightning.EMA or Lightning's EMAWeightAveraging, {REMEDY}"
        )
    steps = math.inf
    if not module.automatic_optimization:
        problems.append(
            f"{asked}they come after optimizer steps, whose number nobody knows with manual optimization: "
            f"take automatic_optimization, {REMEDY}"
        )
    elif math.isinf(steps := trainer.estimated_stepping_batches):
        problems.append(
            f"{asked}they are spread over the training, whose number of steps must be known: give "
            f"trainer.max_epochs or trainer.max_steps, {REMEDY}"
        )
    elif steps <= restarts:
        problems.append(f"{asked}the training has {steps} steps; give fewer restarts than steps.")
    if problems:
        raise ConfigError(problems)
    return int(steps)


def _average_anew(trainer: Any, module: pl.LightningModule, adapter: str) -> None:
    """An average over a restart would be of factors of different updates."""
    updates = updates_of(module, adapter)
    factors = [p for update in updates for n, p in update.named_parameters() if n != "lora_magnitude"]
    for callback in trainer.callbacks:
        if isinstance(callback, EMA):
            callback.average_anew(module, factors)
    average_anew(trainer, module, factors)
