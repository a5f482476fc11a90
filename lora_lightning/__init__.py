"""LoRA for PyTorch Lightning, for vision and speech: the public names."""

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
