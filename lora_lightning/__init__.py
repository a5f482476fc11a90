"""LoRA for PyTorch Lightning, for vision and speech: the public names, each loaded when it is first used.

So the command line can refuse a mistake, print help and complete words without loading torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lora_lightning.libraries import load_lightning

if TYPE_CHECKING:
    from lora_lightning.adapters import (
        adapter_names,
        adapters_off,
        add_adapter,
        delete_adapter,
        lora_parameters,
        merge,
        select,
        unmerge,
    )
    from lora_lightning.callback import LoRACallback
    from lora_lightning.checkpoint import load_adapter, lora_state_dict, save_adapter
    from lora_lightning.combine import combine
    from lora_lightning.config import LoRAConfig
    from lora_lightning.errors import AdapterFileError, ConfigError, UserError
    from lora_lightning.inject import eject, freeze, inject
    from lora_lightning.loader import ResumableLoader
    from lora_lightning.mixed import adapters_for
    from lora_lightning.plans import LayerPlan, Plan
    from lora_lightning.quantization import quantize
    from lora_lightning.resume import ExactResume
    from lora_lightning.targets import plan
    from lora_lightning.trainer_checkpoint import load_from_checkpoint
    from lora_lightning.verify import verify

MODULES = {  # module -> its public names, as above
    "adapters": (
        "adapter_names",
        "adapters_off",
        "add_adapter",
        "delete_adapter",
        "lora_parameters",
        "merge",
        "select",
        "unmerge",
    ),
    "callback": ("LoRACallback",),
    "checkpoint": ("load_adapter", "lora_state_dict", "save_adapter"),
    "combine": ("combine",),
    "config": ("LoRAConfig",),
    "errors": ("AdapterFileError", "ConfigError", "UserError"),
    "inject": ("eject", "freeze", "inject"),
    "loader": ("ResumableLoader",),
    "mixed": ("adapters_for",),
    "plans": ("LayerPlan", "Plan"),
    "quantization": ("quantize",),
    "resume": ("ExactResume",),
    "targets": ("plan",),
    "trainer_checkpoint": ("load_from_checkpoint",),
    "verify": ("verify",),
}
LIGHT = ("config", "errors")  # these need no Lightning
HOMES = {name: module for module, names in MODULES.items() for name in names}

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "ExactResume",
    "LayerPlan",
    "LoRACallback",
    "LoRAConfig",
    "Plan",
    "ResumableLoader",
    "UserError",
    "adapter_names",
    "adapters_for",
    "adapters_off",
    "add_adapter",
    "combine",
    "delete_adapter",
    "eject",
    "freeze",
    "inject",
    "load_adapter",
    "load_from_checkpoint",
    "lora_parameters",
    "lora_state_dict",
    "merge",
    "plan",
    "quantize",
    "save_adapter",
    "select",
    "unmerge",
    "verify",
]


class _Package(ModuleType):
    """This package. `lora_lightning.inject` is the function, whichever module has been imported before."""

    def __getattr__(self, name: str) -> Any:
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if HOMES[name] not in LIGHT:
            load_lightning()
        value = getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets a module that it has loaded as an attribute of its package.
        if not (name in HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *HOMES})


sys.modules[__name__].__class__ = _Package
