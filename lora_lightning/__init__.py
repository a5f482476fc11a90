"""LoRA for PyTorch Lightning, for vision and speech: the public names, each loaded when it is first used.

So the command line can refuse a mistake, print help and complete words without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_lightning.utils.libraries import load_lightning

if TYPE_CHECKING:
    from lora_lightning.adapters.combine import combine
    from lora_lightning.adapters.eject import eject
    from lora_lightning.adapters.inject import inject, linear_probe
    from lora_lightning.adapters.manage import (
        adapter_names,
        adapters_off,
        add_adapter,
        delete_adapter,
        lora_parameters,
        merge,
        set_adapter,
        unmerge,
    )
    from lora_lightning.adapters.mixed_batch import mixed_adapters
    from lora_lightning.adapters.mixture import mixture, mixture_weights
    from lora_lightning.adapters.quantize import quantize
    from lora_lightning.adapters.regularization import regularization
    from lora_lightning.adapters.restarts import restart
    from lora_lightning.adapters.shrink import shrink
    from lora_lightning.adapters.spectra import spectra
    from lora_lightning.adapters.verify import verify
    from lora_lightning.compression.compress import compress
    from lora_lightning.compression.rebuild import compressed, load_compressed, save_compressed
    from lora_lightning.compression.result import Compressed, CompressedLayer
    from lora_lightning.config import LoRAConfig
    from lora_lightning.errors import AdapterFileError, ConfigError, UserError
    from lora_lightning.exporting.card import ExportCard
    from lora_lightning.exporting.export import export
    from lora_lightning.exporting.exported import Exported
    from lora_lightning.files.extract import extract_lora
    from lora_lightning.files.from_model import lora_state_dict
    from lora_lightning.files.save_load import load_adapter, save_adapter
    from lora_lightning.methods.optimizers import param_groups
    from lora_lightning.methods.scaled_adamw import ScaledAdamW
    from lora_lightning.planning.plan import LayerPlan, Plan
    from lora_lightning.planning.targets import plan
    from lora_lightning.serving.client import Client, ServerError
    from lora_lightning.trainer.callback import LoRACallback
    from lora_lightning.trainer.checkpoint import load_from_checkpoint
    from lora_lightning.trainer.ema import EMA
    from lora_lightning.trainer.exact_resume import ExactResume
    from lora_lightning.trainer.loader import ResumableLoader
    from lora_lightning.trainer.speedups import Speedups

MODULES = {  # module -> its public names, as above
    "adapters.combine": ("combine",),
    "adapters.eject": ("eject",),
    "adapters.inject": ("inject", "linear_probe"),
    "adapters.manage": (
        "adapter_names",
        "adapters_off",
        "add_adapter",
        "delete_adapter",
        "lora_parameters",
        "merge",
        "set_adapter",
        "unmerge",
    ),
    "adapters.mixed_batch": ("mixed_adapters",),
    "adapters.mixture": ("mixture", "mixture_weights"),
    "adapters.quantize": ("quantize",),
    "adapters.regularization": ("regularization",),
    "adapters.restarts": ("restart",),
    "adapters.shrink": ("shrink",),
    "adapters.spectra": ("spectra",),
    "adapters.verify": ("verify",),
    "compression.compress": ("compress",),
    "compression.rebuild": ("compressed", "load_compressed", "save_compressed"),
    "compression.result": ("Compressed", "CompressedLayer"),
    "config": ("LoRAConfig",),
    "errors": ("AdapterFileError", "ConfigError", "UserError"),
    "exporting.card": ("ExportCard",),
    "exporting.export": ("export",),
    "exporting.exported": ("Exported",),
    "files.extract": ("extract_lora",),
    "files.from_model": ("lora_state_dict",),
    "files.save_load": ("load_adapter", "save_adapter"),
    "methods.optimizers": ("param_groups",),
    "methods.scaled_adamw": ("ScaledAdamW",),
    "planning.plan": ("LayerPlan", "Plan"),
    "planning.targets": ("plan",),
    "serving.client": ("Client", "ServerError"),
    "trainer.callback": ("LoRACallback",),
    "trainer.checkpoint": ("load_from_checkpoint",),
    "trainer.ema": ("EMA",),
    "trainer.exact_resume": ("ExactResume",),
    "trainer.loader": ("ResumableLoader",),
    "trainer.speedups": ("Speedups",),
}
LIGHT = ("config", "errors", "serving.client")  # these need no Lightning
HOMES = {name: module for module, names in MODULES.items() for name in names}

__all__ = [
    "EMA",
    "AdapterFileError",
    "Client",
    "Compressed",
    "CompressedLayer",
    "ConfigError",
    "ExactResume",
    "ExportCard",
    "Exported",
    "LayerPlan",
    "LoRACallback",
    "LoRAConfig",
    "Plan",
    "ResumableLoader",
    "ScaledAdamW",
    "ServerError",
    "Speedups",
    "UserError",
    "adapter_names",
    "adapters_off",
    "add_adapter",
    "combine",
    "compress",
    "compressed",
    "delete_adapter",
    "eject",
    "export",
    "extract_lora",
    "inject",
    "linear_probe",
    "load_adapter",
    "load_compressed",
    "load_from_checkpoint",
    "lora_parameters",
    "lora_state_dict",
    "merge",
    "mixed_adapters",
    "mixture",
    "mixture_weights",
    "param_groups",
    "plan",
    "quantize",
    "regularization",
    "restart",
    "save_adapter",
    "save_compressed",
    "set_adapter",
    "shrink",
    "spectra",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if HOMES[name] not in LIGHT:
        load_lightning()
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
