"""The layer families, one file each. A new family is a new file and one line in FAMILIES."""

from __future__ import annotations

from torch import nn

from lora_lightning.layers.conv import LoRAConv
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.linear import LoRALinear

FAMILIES: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Conv2d: LoRAConv,
}


def family_of(module: nn.Module) -> type[LoRALayer] | None:
    """The family whose base class `module` has, adapted or not; None when there is none."""
    return next((family for base, family in FAMILIES.items() if isinstance(module, base)), None)


def refusal(module: nn.Module) -> str | None:
    """Why `module` cannot be adapted, or None when it can."""
    family = family_of(module)
    if family is None:
        return f"{type(module).__name__} is not a supported layer"
    if isinstance(module, LoRALayer):
        return "it is adapted already"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight norm, a parametrization) or quantized"
    if isinstance(weight, nn.UninitializedParameter):
        return "its shape is not known yet: run one batch through the model first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    return family.refusal(module)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every adapted layer of the model by name, in the order of registration."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}
