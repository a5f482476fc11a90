"""What PEFT's users type, and what it is called here: the fields of PEFT's `LoraConfig` (0.21.2).

Those that are not here mean the same (`target_modules`, `exclude_modules`, `modules_to_save`,
`rank_pattern`, `alpha_pattern`, `use_rslora`, `use_dora`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ALL_LINEAR = "all-linear"  # PEFT's word among `target_modules`
INIT_NAMES = {n: n for n in ("gaussian", "orthogonal", "pissa", "olora")}  # `init_lora_weights` -> `init`
RENAMED = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "bias": "train_bias"}
VARIANTS = {  # of LoRA, that do not exist here, and what is different about them
    "layer_replication": "the base model is rebuilt with repeated layers",
    "lora_bias": "its updates have a bias of their own",
    "trainable_token_indices": "single rows of an embedding are trained; target the embedding instead",
    "target_parameters": "parameters outside of layers are adapted",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "ensure_weight_tying": "two layers share one update",
}
NEEDLESS = {
    "fan_in_fan_out": "weights of (in, out) are known by their class",
    "task_type": "the model is taken as it is, and modules_to_save='auto' finds its head",
    "inference_mode": "model.eval() is enough",
    "loftq_config": "lora_lightning.quantize(model, 'nf4') quantizes the base, and updates begin at zero",
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config"), "init says how updates begin"
    ),
    **dict.fromkeys(
        (
            "megatron_config", "megatron_core", "velora_config", "use_qalora", "qalora_group_size",
            "monteclora_config", "use_bdlora", "arrow_config", "kasa_config",
        ),
        "this variant of LoRA does not exist",
    ),
    **dict.fromkeys(
        (
            "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "runtime_config",
        ),
        "it says nothing of the updates",
    ),
    **{name: f"this variant of LoRA does not exist: {why}" for name, why in VARIANTS.items()},
}  # fmt: skip
NAMES = (*RENAMED, "init_lora_weights", "layers_to_transform", "layers_pattern", *NEEDLESS)
# Options of PEFT that say what the tensors mean.
PEFT_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "modules_to_save", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip
# Options of PEFT that say nothing of what the tensors mean, or that the tensors say themselves.
NEUTRAL = (
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_type",
    "peft_version", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config", "init_lora_weights",
)  # fmt: skip


def peft_problem(name: str, value: Any, prefix: str = "") -> str | None:
    """What to write in the place of an option of PEFT; None for a name that is none of NAMES.

    Args:
        prefix: of options, such as `lora.` on a command line.
    """

    def write(ours: str, value: Any) -> str:
        return f"{prefix}{ours}={value!r}"

    if name in RENAMED:
        remedy = f"here it is {write(RENAMED[name], value)}"
    elif name == "init_lora_weights":
        remedy = _init(value, write)
    elif name == "layers_to_transform":
        remedy = f"here the targets say so: {write('target_modules', layer_globs(value))}"
    elif name == "layers_pattern":
        inside = value if isinstance(value, str) else "blocks"
        remedy = f"here the targets say so: {write('target_modules', [f'{inside}.0.*'])}"
    elif name in NEEDLESS:
        remedy = f"leave it out; here {NEEDLESS[name]}"
    else:
        return None
    return f"{prefix}{name}={value!r} is PEFT's: {remedy}."


def layer_globs(numbers: Any) -> list[str]:
    """Globs for the layers that `layers_to_transform` numbers."""
    numbers = [numbers] if isinstance(numbers, int) else numbers
    known = isinstance(numbers, (list, tuple)) and numbers and all(isinstance(n, int) for n in numbers)
    return [f"*.{n}.*" for n in (numbers if known else [0, 1])]


def init_of(value: Any) -> str | None:
    """Our `init` of PEFT's `init_lora_weights`; None where there is none."""
    if value is True:
        return "default"
    if not isinstance(value, str):
        return None
    return "pissa_fast" if value.startswith("pissa_niter_") else INIT_NAMES.get(value)


def _init(value: Any, write: Callable[[str, Any], str]) -> str:
    ours = init_of(value)
    if ours is not None:
        return f"here it is {write('init', ours)}" + (", which needs not be said" if value is True else "")
    if value == "eva":
        return f"here it is {write('init', 'eva')}, and {write('rank', 'auto')} to share the ranks out"
    if value is False:
        return "leave it out; here updates begin at zero, so that the outputs do not change at injection"
    return f"there is no such beginning here; give {write('init', 'default')}, or another one of its choices"
