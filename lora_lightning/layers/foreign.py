"""Layers that another library has adapted, and classes with attributes that an adapted layer needs itself."""

from __future__ import annotations

import functools
import inspect

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lora_lightning.layers.size import FixedSize
from lora_lightning.layers.swap import ClassSwap
from lora_lightning.utils.names import by_class

MERGE_PEFT = (
    "call its merge_and_unload() first, or give the base model, and its saved adapter to "
    "lora_lightning.load_adapter"
)
MERGE = "merge its updates first, or give the base model"
# Module and class -> the library and what to do.
LIBRARIES = {
    ("peft.tuners.tuners_utils", "BaseTunerLayer"): ("PEFT", MERGE_PEFT),
    ("peft.utils.other", "AuxiliaryTrainingWrapper"): ("PEFT", MERGE_PEFT),
    ("peft.peft_model", "PeftModel"): ("PEFT", MERGE_PEFT),
    ("loralib.layers", "LoRALayer"): ("loralib", MERGE),
    ("minlora.model", "LoRAParametrization"): ("minLoRA", MERGE),
    ("torchtune.modules.peft.lora", "LoRALinear"): ("torchtune", MERGE),
    ("litgpt.lora", "LoRALayer"): ("litgpt", MERGE),
}
# What an adapted class overrides on purpose, calling what was there.
OVERRIDDEN = {"forward", "reset_parameters", "_reset_parameters"}


def library_of(module: nn.Module) -> tuple[str, str] | None:
    """Name of the library whose adapted layer this is, and the remedy; None for others."""
    return by_class(module, LIBRARIES)


def own_update(module: nn.Module) -> str | None:
    """Why a layer that holds an A and a B already cannot be adapted; None when it holds none."""
    holders = [module, *(m for p in module.modules() if isinstance(p, ParametrizationList) for m in p)]
    if any({"lora_A", "lora_B"} <= holder._parameters.keys() for holder in holders):
        return f"it has a lora_A and a lora_B already: {MERGE}"
    return None


def taken_names(module: nn.Module, family: type[ClassSwap]) -> list[str]:
    """Attributes that a layer of this family needs and the module has for something else."""
    classes = [c for c in type(module).__mro__ if not c.__module__.startswith("torch.") and c is not object]
    own = {*module._parameters, *module._buffers, *module._modules, *(n for c in classes for n in vars(c))}
    # while a model is as before, the layers' own records stay in the dictionaries of their modules
    own |= {n for n in module.__dict__ if not n.startswith("lora_")}
    torch = [c for c in type(module).__mro__ if c.__module__.startswith("torch.")]
    needed: frozenset[str] = _needed(family)  # type: ignore[arg-type]  # a class is hashable
    return sorted(n for n in own & needed if not any(hasattr(c, n) for c in torch))


@functools.cache
def _needed(family: type[ClassSwap]) -> frozenset[str]:
    ours = [c for c in family.__mro__ if issubclass(c, ClassSwap)]
    names = {n for c in ours for n in (*vars(c), *inspect.get_annotations(c))}
    names -= {n for c in ours for n, value in vars(c).items() if isinstance(value, FixedSize)}
    return frozenset(n for n in names if not n.startswith("__") and n not in OVERRIDDEN)
