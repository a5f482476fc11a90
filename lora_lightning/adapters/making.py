"""The updates of a plan, made for a model that is not touched, and what they need of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.config import LoRAConfig
from lora_lightning.layers.layer import LoRALayer, slot_key
from lora_lightning.layers.mixture import MixtureUpdate
from lora_lightning.layers.registry import family_of, slots_of
from lora_lightning.layers.slot import Slot, read_weight
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.methods.inits import INITS, begin
from lora_lightning.planning.plan import LayerPlan, Plan
from lora_lightning.utils.names import submodule

Made = dict[str, tuple[type[LoRALayer], dict[str, LowRankUpdate]]]  # by module: its family, updates by slot


def made_updates(model: nn.Module, config: LoRAConfig, planned: Plan, begins: bool) -> Made:
    """The updates of a plan, for a model that looks as it did before it was adapted; it is not touched."""
    made: Made = {}
    for item in planned.layers:
        module = submodule(model, item.module)
        slot = slots_of(item.module, module)[item.slot]
        weight = slot.of(read_weight(module, slot.parameter))
        init = config.init if begins else "default"
        update = planned_update(weight, slot, item, config, init).requires_grad_(False)
        begin(update, weight, item.name, getattr(module, "padding_idx", None))
        made.setdefault(item.module, (family_of(module), {}))[1][slot_key(item.slot)] = update
    return made


def planned_update(
    weight: Tensor, slot: Slot, planned: LayerPlan, config: LoRAConfig, init: str = "default"
) -> LowRankUpdate:
    """The update of a planned layer.

    Args:
        weight: of the layer, or the rows of it that the slot means.
        init: as `LoRAConfig.init`.
    """
    options: dict[str, Any] = {
        "scaling": config.scaling(planned.rank, planned.alpha),
        "dropout": config.dropout,
        "init": init,
        "implementation": config.implementation,
    }
    if planned.mixed:
        return MixtureUpdate(weight, slot, ranks=[rank for _, rank in planned.mixed], **options)
    return LowRankUpdate(weight, slot, planned.rank, use_dora=config.use_dora, fixed=planned.fixed, **options)


def needs_values(config: LoRAConfig) -> list[str]:
    """What begins as the weights say, which a model on the meta device does not have yet."""
    remedy = "does not have yet: give it memory and load its weights first, or set"
    problems = []
    if config.use_dora:
        problems.append(
            "use_dora=True: magnitudes begin as the norms of the weights, which a model on the meta device "
            f"{remedy} use_dora to false."
        )
    if config.init in INITS:
        problems.append(
            f"init={config.init!r}: updates begin with values made of the weights, which a model on the meta "
            f'device {remedy} init to "default".'
        )
    return problems
