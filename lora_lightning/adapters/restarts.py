"""Restarts of a model's selected adapters, and what optimizers know of them."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from lora_lightning.adapters.inject import refuse_merged
from lora_lightning.adapters.state import is_injected, state_of, update_of
from lora_lightning.errors import UserError
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.methods.restarts import first_place, restart_update, restarts_done


def restart(model: nn.Module, *optimizers: Optimizer) -> None:
    """Keep what the selected adapters have learned and let their A and B begin anew: in the end the updates
    are of rank r·(1 + restarts) at the optimizer's cost of rank r (ReLoRA, Lialin et al. 2023, arXiv
    2307.05695). The outputs do not change.

    The paper's optimizer loses 99 % of its moments of A and B, its code all or 99.9 %; here all, with the
    count of steps, so that the first steps have the size that they have at the beginning. Let the rate climb
    again from zero, too. With LoRACallback, and in its tasks' schedules, all of that is done.

    Args:
        model: the module that was given to `inject`, with `LoRAConfig(restarts=…)`.
        optimizers: those of its parameters.

    Raises:
        UserError: no selected adapter has a restart left; the model is not adapted, or merged.
    """
    refuse_merged(model)
    state = state_of(model)
    left = [n for n in state.active if done(model, n) < state.adapters[n].config.restarts]
    if not left:
        asked = state.config.restarts
        raise UserError(
            f"restart: adapter {state.adapter!r} has no restart left of restarts={asked}, and no room for "
            "what it has learned: give LoRAConfig(restarts=…) as many as there will be."
        )
    for adapter in left:
        restart_adapter(model, adapter, *optimizers)


def restarts_of(model: nn.Module) -> int:
    """How many restarts the training of the first selected adapter has; 0 of a model that is not adapted."""
    return state_of(model).config.restarts if is_injected(model) else 0


def done(model: nn.Module, adapter: str) -> int:
    """How many restarts an adapter has behind it; all of them where it has no layer, or no room."""
    restarts = state_of(model).adapters[adapter].config.restarts
    return min((restarts_done(u, restarts) for u in updates_of(model, adapter)), default=restarts)


def updates_of(model: nn.Module, adapter: str) -> list[LowRankUpdate]:
    """An adapter's updates, in the order of its plan."""
    return [update_of(model, layer, adapter) for layer in state_of(model).adapters[adapter].plan.layers]


def restart_adapter(model: nn.Module, adapter: str, *optimizers: Optimizer) -> None:
    """The next restart of one adapter, which has one left; optimizers forget its A and B."""
    config, number = state_of(model).adapters[adapter].config, done(model, adapter)
    for update in updates_of(model, adapter):
        place = first_place(update, config.restarts) + number * update.rank
        restart_update(update, place, config.init)
        for optimizer in optimizers:
            for factor in (update.lora_A, update.lora_B):
                optimizer.state.pop(factor, None)
