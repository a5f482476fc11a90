"""The layer families, one file each. A new family is a new file and a line or two here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lora_lightning.layers.attention import FUSED, attention_slots, fused_parts
from lora_lightning.layers.conv import LoRAConv, LoRAConvTranspose, conv_slot, transposed_slot
from lora_lightning.layers.embedding import EMBEDDING_SLOT, LoRAEmbedding, LoRAEmbeddingBag
from lora_lightning.layers.foreign import own_update, taken_names
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.linear import LoRALinear
from lora_lightning.layers.norm import is_norm
from lora_lightning.layers.recurrent import LoRARecurrent, recurrent_slots
from lora_lightning.layers.slot import Slot, read_weight
from lora_lightning.layers.swap import class_of
from lora_lightning.utils.names import unwrapped

# The base class whose forward a family knows. A class with a forward of its own, or a weight that is
# computed, takes the general road: LoRALayer itself.
FAMILIES: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Conv1d: LoRAConv,
    nn.Conv2d: LoRAConv,
    nn.Conv3d: LoRAConv,
    nn.ConvTranspose1d: LoRAConvTranspose,
    nn.ConvTranspose2d: LoRAConvTranspose,
    nn.ConvTranspose3d: LoRAConvTranspose,
    nn.Embedding: LoRAEmbedding,
    nn.EmbeddingBag: LoRAEmbeddingBag,
    nn.LSTM: LoRARecurrent,
    nn.GRU: LoRARecurrent,
    nn.RNN: LoRARecurrent,
}


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IN_FLOATS = "load the model in float32, float16 or bfloat16, and call lora_lightning.quantize"


def family_of(module: nn.Module) -> type[LoRALayer]:
    """The family that adapts `module`: by the class whose forward it has, else the general road."""
    for base, family in FAMILIES.items():
        if isinstance(module, base) and all(
            getattr(class_of(module), method) is getattr(base, method)
            for method in ("forward", "_conv_forward")
            if hasattr(base, method)
        ):
            computed = is_parametrized(module) and family is not LoRARecurrent
            return LoRALayer if computed else family
    return LoRALayer


def slots_of(name: str, module: nn.Module) -> dict[str, Slot]:
    """Where `module`, called `name` in its model, can have updates: slot name -> Slot. The slot of a
    module with one weight is called "". Empty when there is nothing to adapt."""
    if isinstance(module, nn.MultiheadAttention):
        return attention_slots(module)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return recurrent_slots(module)
    if not _holds_weight(module) or is_norm(module):
        return {}
    if isinstance(module, _ConvTransposeNd):
        return {"": transposed_slot(module)}
    if isinstance(module, _ConvNd):
        return {"": conv_slot(module)}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"": EMBEDDING_SLOT}
    if type(module).__name__ == "Conv1D":  # transformers' linear layer with a weight of (in, out)
        return {"": Slot("weight", transposed=True)}
    slots = {"": Slot("weight")}
    if isinstance(module, nn.Linear) and name.rpartition(".")[2] in FUSED and module.out_features % 3 == 0:
        slots.update(fused_parts("", "weight", module.out_features // 3))
    return slots


def refusal(module: nn.Module) -> str | None:
    """Why a module with a weight cannot be adapted, or None when it can."""
    if isinstance(module, nn.Bilinear):
        return "Bilinear is not linear in one input"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites its weight in every forward: build it with max_norm=None"
    for name, weight in module._parameters.items():
        if weight is None or "weight" not in name:
            continue
        if isinstance(weight, nn.UninitializedParameter):
            return "its shape is not known yet: run one batch through the model first"
        if weight.dtype not in DTYPES:
            remedy = "LoRA here is for real weights" if weight.is_complex() else IN_FLOATS
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}: {remedy}"
        if type(weight).__module__.startswith("torchao."):
            return f"its weight is torchao's {type(weight).__name__}: {IN_FLOATS}"
    if reason := own_update(module):
        return reason
    if taken := taken_names(module, family_of(module)):
        return f"its attribute {' and '.join(taken)} is one that an adapted layer needs for itself: rename it"
    return None


def hidden_weight(module: nn.Module) -> str | None:
    """Why a module whose weight is no parameter cannot be adapted, or None for any other module."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            old = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            return (
                f"torch.nn.utils.{old} makes its {hook.name} anew in every forward: "
                f"use torch.nn.utils.parametrizations.{old}"
            )
    path = type(module).__module__
    packed = path.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")) and (
        hasattr(module, "get_weight") or callable(getattr(module, "weight", None))
    )
    if packed or "qweight" in {*module._buffers, *module._parameters}:
        return f"its weight is quantized: {IN_FLOATS}"
    return None


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every adapted layer of the model by name, in the order of registration."""
    return {n: m for n, m in base_modules(model) if isinstance(m, LoRALayer)}


def update_ids(model: nn.Module) -> set[int]:
    """Identities of the parameters of every update in the model, of adapters that are not selected too."""
    return {id(p) for layer in lora_layers(model).values() for p in layer.lora.parameters()}


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`names.named_modules(model)` without the updates, of which there may be thousands."""
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        module = unwrapped(module)
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        updates = module._modules.get("lora") if isinstance(module, LoRALayer) else None
        children = [(n, c) for n, c in module._modules.items() if c is not None and c is not updates]
        waiting += [(f"{name}.{n}".lstrip("."), c) for n, c in reversed(children)]


def _holds_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if weight is None:
        return is_parametrized(module, "weight") and read_weight(module, "weight").dim() >= 2
    return isinstance(weight, nn.UninitializedParameter) or weight.dim() >= 2
