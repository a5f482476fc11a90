"""What a configuration leaves to data, decided on a plain model: ranks, and the values that updates begin
with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base_values import refuse_meta
from lora_lightning.adapters.measure import Step, gradient_spectra, input_spectra
from lora_lightning.adapters.state import update_of
from lora_lightning.adapters.unharmed import unharmed
from lora_lightning.config import BY_GRADIENTS, LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.kernels.quantized_tensor import is_quantized
from lora_lightning.layers.factors import sides
from lora_lightning.layers.registry import slots_of
from lora_lightning.methods.data_inits import BY_DATA
from lora_lightning.methods.moments import Spectrum
from lora_lightning.methods.ranks import by_budget, by_energy, explained
from lora_lightning.planning.plan import LayerPlan, Plan
from lora_lightning.planning.ranks import Decided, Shared, shared_out
from lora_lightning.planning.structure import targets_of
from lora_lightning.planning.targets import plan
from lora_lightning.utils.names import named_parameters, submodule
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import truncate_list


@dataclass(frozen=True)
class Decision:
    """What data have decided.

    Attributes:
        plan: with the decided ranks.
        values: the two sides of B·A with which the update of a layer begins, by the layer's name.
    """

    plan: Plan
    values: dict[str, tuple[Tensor, Tensor]]


def decide(
    model: nn.Module, config: LoRAConfig, batches: Iterable[Any], step: Step, *beside: object
) -> Decision:
    """Run a plain model over some batches and decide what the configuration leaves to data. The model is,
    bit for bit, as it was.

    Args:
        batches: each of them counts.
        step: called with each batch: runs the model, and returns the loss where gradients are asked for.
        beside: other objects whose attributes a step may change, which are put back.

    Raises:
        ConfigError: as `plan`, or some layers do not allow it, by name.
        UserError: the model is on the meta device; the batches do not show what is asked for.
    """
    refuse_meta(model, config.by_data)
    planned = plan(model, config)
    shared = None if isinstance(config.rank, int) else _shared(model, config, planned)
    waiting = [p for p in planned.layers if shared and p.name in shared.costs]
    gradients = config.init in BY_GRADIENTS
    needed = planned.layers if config.init in BY_DATA else waiting
    _refuse_unfit(model, config, needed, gradients)
    highest = _highest(config, shared) if shared and config.rank == "auto" else {}
    batches = working(batches, "measuring by data", "batches")
    try:
        with unharmed(model, *beside):
            if gradients:
                spectra, count = gradient_spectra(model, needed, batches, step)
            else:
                most = {p.name: p.rank for p in needed} | highest
                spectra, count = input_spectra(model, needed, batches, step, most)
    except UserError as error:
        raise UserError(f"{config.by_data}: {error}.") from None
    ranks = _ranks(config, shared, spectra) if shared else {}
    shares = {name: explained(spectra[name].shares(), rank) for name, rank in ranks.items()}
    planned = plan(model, config, Decided(ranks, shares, _how(config, gradients, count)))
    return Decision(planned, _values(model, config, planned, spectra))


@torch.no_grad()
def begin_with(model: nn.Module, decision: Decision, adapter: str) -> None:
    """Give the updates of an adapter the values that data have decided."""
    for layer in decision.plan.layers:
        if layer.name in decision.values:
            update = update_of(model, layer, adapter)
            left, right = (side.to(update.lora_A) for side in decision.values[layer.name])
            own_left, own_right = sides(update.slot, update.lora_A, update.lora_B, update.rank)
            update.begin_at(left.expand_as(own_left), right.expand_as(own_right))


def _refuse_unfit(model: nn.Module, config: LoRAConfig, layers: list[LayerPlan], gradients: bool) -> None:
    """Refuse what cannot be measured, every layer of a kind in one line.

    Raises:
        ConfigError: there is some.
    """
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        module = submodule(model, layer.module)
        slot = slots_of(layer.module, module)[layer.slot]
        weight = module._parameters.get(slot.parameter)
        if gradients and weight is not None and is_quantized(weight):
            reasons.setdefault("are quantized and have no gradient", []).append(layer.name)
        elif not gradients and slot.zero == "A":
            told = "look up rows, and have no inputs that are multiplied"
            reasons.setdefault(told, []).append(layer.name)
        elif not gradients and slot.parameter.startswith("weight_hr"):
            reasons.setdefault("project within their RNN, where nothing sees their inputs", []).append(
                layer.name
            )
    if reasons:
        remedy = "name them in exclude_modules" + (
            "" if config.init in BY_DATA else ", or give them ranks in rank_pattern"
        )
        raise ConfigError([
            f"{config.by_data}: {truncate_list(names)} {told}: {remedy}." for told, names in reasons.items()
        ])  # fmt: skip


def _shared(model: nn.Module, config: LoRAConfig, planned: Plan) -> Shared:
    """What there is to share out, by the layers' names in the model."""
    network, start = submodule(model, planned.backbone), f"{planned.backbone}." if planned.backbone else ""
    targets = targets_of(network)[0]
    total = sum(p.numel() for p in named_parameters(model).values())
    names = [p.name.removeprefix(start) for p in planned.layers]
    return shared_out(config, {name: targets[name] for name in names}, total).named(start)


def _highest(config: LoRAConfig, shared: Shared) -> dict[str, int]:
    """The highest rank of each layer whose rank is left to data."""
    if config.rank != "auto":
        return dict(shared.sides)
    return {name: min(side, int(config.rho * shared.even)) for name, side in shared.sides.items()}


def _ranks(config: LoRAConfig, shared: Shared, spectra: dict[str, Spectrum]) -> dict[str, int]:
    shares = {name: spectra[name].shares() for name in shared.costs}
    highest = _highest(config, shared)
    if config.rank == "auto":
        return by_budget(shares, shared.costs, highest, shared.budget)
    share = float(str(config.rank).partition(":")[2])
    return {name: by_energy(values, highest[name], share) for name, values in shares.items()}


def _how(config: LoRAConfig, gradients: bool, count: int) -> str:
    what = "the gradients of the weights" if gradients else "the inputs of the layers"
    return f"{config.by_data}: by {what} in {count} {'batch' if count == 1 else 'batches'}"


def _values(
    model: nn.Module, config: LoRAConfig, planned: Plan, spectra: dict[str, Spectrum]
) -> dict[str, tuple[Tensor, Tensor]]:
    values: dict[str, tuple[Tensor, Tensor]] = {}
    if (begin := BY_DATA.get(config.init)) is None:
        return values
    for layer in planned.layers:
        seen = spectra[layer.name]
        if config.init in BY_GRADIENTS and not seen.total.any():
            continue  # A and B of zero would never train
        slot = slots_of(layer.module, submodule(model, layer.module))[layer.slot]
        left, right = begin(slot, layer.rank, seen)
        values[layer.name] = (left.cpu(), right.cpu())
    return values
