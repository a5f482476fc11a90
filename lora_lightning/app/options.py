"""What every option of the training application may be, as one table of rules by dotted name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

QUANTIZERS = ("int8", "nf4")  # those of lora_lightning.kernels.quantized_tensor, which loads torch
STRATEGIES = (  # Lightning's own that can start from a Hydra application: no spawn, fork, notebook
    "auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true",
    "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload",
    "deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme",
    "fsdp", "fsdp_cpu_offload", "single_device", "single_xla", "single_tpu", "xla", "xla_debug",
)  # fmt: skip
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
SHORT_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}  # Lightning's
DURATION = re.compile(r"\d+:\d\d:\d\d:\d\d")


class Rule(NamedTuple):
    """What a value may be, in words and as a test; `names` are its choices, for near misses."""

    allowed: str
    test: Callable[[Any], bool]
    names: tuple[str, ...] = ()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_part(value: Any) -> bool:
    """Of batches: a number of them, also written 2.0, or a fraction."""
    return _is_number(value) and (0 <= value <= 1 or (value > 1 and value == int(value)))


def _is_duration(value: Any) -> bool:
    if isinstance(value, dict):  # of datetime.timedelta's arguments
        return bool(value) and all(_is_number(v) for k, v in value.items() if k != "_target_")
    return isinstance(value, str) and DURATION.fullmatch(value) is not None


def precision_of(value: Any) -> str:
    """Lightning's full name of a precision that may be given for short, as 32 or "bf16"."""
    short = "" if isinstance(value, bool) else str(value)
    return "32-true" if value is None else SHORT_PRECISIONS.get(short, short)


def devices_of(value: Any) -> Any:
    """Devices that may be given as a text, "2" or "0,1", as a number or a list."""
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.rstrip(", ").split(",")]
    if not all(part.lstrip("-").isdigit() for part in parts):
        return value
    numbers = [int(part) for part in parts]
    return numbers if "," in value else numbers[0]


def whole(low: int, high: float = math.inf) -> Rule:
    bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    return Rule(f"a whole number {bounds}", lambda v: _is_whole(v) and low <= v <= high)


def number(low: float, high: float = math.inf) -> Rule:
    bounds = f"of at least {low:g}" if high == math.inf else f"of at least {low:g} and below {high:g}"
    return Rule(f"a number {bounds}", lambda v: _is_number(v) and low <= v < high)


def choice(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names, names)


def or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or null", lambda v: v is None or rule.test(v), rule.names)


TEXT = Rule("a text", _is_text)
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
TEXTS = Rule(
    "a list of words, such as [first,tuned]",
    lambda v: isinstance(v, list) and all(map(_is_text, v)),
)
RATE = Rule("a number above 0; 1e-4 to 1e-1 are usual", lambda v: _is_number(v) and v > 0)
SHARE = Rule("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
UNBOUNDED = Rule(
    "a whole number of at least 1, or -1 for no limit",
    lambda v: _is_whole(v) and (v >= 1 or v == -1),
)
PART = Rule(
    "a whole number of batches, a fraction from 0.0 to 1.0 of them, or null for all",
    lambda v: v is None or _is_part(v),
)
DEVICES = Rule(
    "a whole number of at least 1, -1 or auto for all, or a list of their numbers, such as [0,2]",
    lambda v: (
        (v := devices_of(v)) in ("auto", -1)
        or (_is_whole(v) and v >= 1)
        or (
            isinstance(v, list)
            and len(set(map(str, v))) == len(v) > 0
            and all(_is_whole(d) and d >= 0 for d in v)
        )
    ),
)
PRECISION = Rule(
    f"one of {', '.join(PRECISIONS)}, or for short {', '.join(SHORT_PRECISIONS)}, or null",
    lambda v: v is None or precision_of(v) in PRECISIONS,
    (*PRECISIONS, *SHORT_PRECISIONS),
)
TIME = Rule(
    "a time as DD:HH:MM:SS, a mapping such as {hours:5}, or null",
    lambda v: v is None or _is_duration(v),
)
MAPPING = Rule("a mapping, or null", lambda v: v is None or isinstance(v, dict))

RULES: dict[str, Rule] = {
    "seed": whole(0, 2**32 - 1),
    "threads": or_null(whole(1)),
    "ckpt_path": or_null(TEXT),
    "tags": TEXTS,
    "compare": FLAG,
    "adapters": MAPPING,
    "peers.probe.lr": RATE,
    "peers.full.lr": RATE,
    "run_dir": TEXT,
    "lora.enabled": FLAG,
    "lora.quantize": or_null(choice(*QUANTIZERS)),
    "model._target_": TEXT,
    "model.checkpoint": or_null(TEXT),
    "model.pretrained": FLAG,
    "data._target_": TEXT,
    "data.batch_size": whole(1),
    "data.seed": whole(0, 2**32 - 1),
    "data.num_workers": or_null(whole(0)),
    "task._target_": TEXT,
    "trainer._target_": TEXT,
    "trainer.accelerator": choice(*ACCELERATORS),
    "trainer.devices": DEVICES,
    "trainer.num_nodes": whole(1),
    "trainer.precision": PRECISION,
    "trainer.max_epochs": or_null(UNBOUNDED),
    "trainer.max_steps": UNBOUNDED,
    "trainer.max_time": TIME,
    "trainer.accumulate_grad_batches": whole(1),
    "trainer.gradient_clip_val": or_null(number(0)),
    "trainer.check_val_every_n_epoch": or_null(whole(1)),
    "trainer.val_check_interval": Rule(
        "a whole number of batches, a fraction of an epoch up to 1.0, a time as DD:HH:MM:SS, or null",
        lambda v: v is None or (_is_part(v) and v > 0) or _is_duration(v),
    ),
    "trainer.limit_train_batches": PART,
    "trainer.limit_val_batches": PART,
    "trainer.limit_test_batches": PART,
    "trainer.overfit_batches": Rule(
        "a whole number of batches, or a fraction from 0.0 to 1.0 of them; 0 for none", _is_part
    ),
    "trainer.log_every_n_steps": or_null(whole(0)),
    "trainer.num_sanity_val_steps": or_null(whole(-1)),
    "trainer.deterministic": Rule(
        "true, false, warn or null", lambda v: v is None or isinstance(v, bool) or v == "warn"
    ),
    "trainer.benchmark": or_null(FLAG),
    "trainer.enable_progress_bar": or_null(FLAG),
    "callbacks.checkpoint": MAPPING,
    "callbacks.last": MAPPING,
    "callbacks.last.dirpath": TEXT,
    "callbacks.last.filename": or_null(TEXT),
    "callbacks.last.save_on_train_epoch_end": FLAG,
    "callbacks.preemption": MAPPING,
    "callbacks.preemption.dirpath": TEXT,
    "callbacks.learning_rate": MAPPING,
    "callbacks.checkpoint.dirpath": TEXT,
    "callbacks.checkpoint.filename": or_null(TEXT),
    "callbacks.checkpoint.monitor": or_null(TEXT),
    "callbacks.checkpoint.mode": choice("min", "max"),
    "callbacks.checkpoint.save_top_k": whole(-1),
    "callbacks.checkpoint.save_last": or_null(FLAG),
    "callbacks.checkpoint.save_weights_only": FLAG,
    "callbacks.learning_rate.logging_interval": or_null(choice("step", "epoch")),
    "logger.choose": FLAG,
    "logger.csv": MAPPING,
    "logger.tensorboard": MAPPING,
    "logger.wandb": MAPPING,
    "logger.wandb.project": TEXT,
    "logger.wandb.name": or_null(TEXT),
    "logger.wandb.entity": or_null(TEXT),
    "logger.wandb.group": or_null(TEXT),
    "logger.wandb.id": or_null(TEXT),
    "logger.wandb.tags": TEXTS,
    "logger.wandb.offline": or_null(FLAG),
}

# Options that only one class has: of the section whose `_target_` it is.
CLASS_RULES: dict[str, dict[str, Rule]] = {
    "lora_lightning.models.timm.timm_model": {
        "name": TEXT,
        "img_size": whole(1),
        "patch_size": whole(1),
        "embed_dim": whole(1),
        "depth": whole(1),
        "num_heads": whole(1),
        "drop_path_rate": or_null(number(0, 1)),
    },
    "lora_lightning.models.detection.detector": {"name": TEXT, "pretrained_backbone": FLAG},
    "lora_lightning.data.shapes.ShapesDataModule": {
        "domain": choice("source", "target"),
        "side": whole(32),
        **dict.fromkeys(("train_size", "val_size", "test_size"), whole(1)),
    },
    "lora_lightning.data.digits.DigitsDataModule": {
        "domain": choice("source", "target"),
        "train_size": whole(1, 900),
    },
    "lora_lightning.data.cifar.CIFARDataModule": {
        "name": choice("cifar10", "cifar100"),
        "root": TEXT,
        "download": FLAG,
        "val_size": whole(1, 49_999),
        "mixup": number(0),
        "cutmix": number(0),
        "image_size": or_null(whole(8)),
        "auto_augment": or_null(TEXT),
        **dict.fromkeys(("hflip", "random_erasing", "mix_prob"), SHARE),
    },
    "lora_lightning.tasks.classification.ImageClassifier": {"label_smoothing": number(0, 1)},
    "lora_lightning.tasks.detection.ObjectDetector": {
        "area_scale": Rule("a number above 0; 1 for COCO's own sizes", lambda v: _is_number(v) and v > 0),
        "score_threshold": SHARE,
    },
}

REQUIRED = ("model", "data", "task", "lora", "optim", "trainer", "peers")
OPTIONAL = ("callbacks", "logger")

# Arguments that the application passes itself, and what to do instead.
OF_THE_DATA = dict.fromkeys(("num_classes", "class_names", "vocabulary", "kept"), "the data decides")
PROVIDED: dict[str, dict[str, str]] = {
    "model": OF_THE_DATA,
    "task": {**OF_THE_DATA, "model": "use model=NAME", "optim": "use optim.KEY=VALUE"},
    "trainer": {
        "logger": "use logger=NAME",
        "plugins": "it writes checkpoints whole",
        "callbacks": "use +callbacks.NAME._target_=CLASS",
        "default_root_dir": "use hydra.run.dir=FOLDER",
        "enable_model_summary": "the plan is printed instead",
    },
}


def rules_of(values: Mapping[str, Any]) -> dict[str, Rule]:
    """Every rule for a configuration: the general ones, and those of the classes that it builds."""
    rules = dict(RULES)
    for section in ("model", "data", "task"):
        node = values.get(section)
        target = node.get("_target_") if isinstance(node, Mapping) else None
        own = CLASS_RULES.get(target, {}) if isinstance(target, str) else {}
        rules |= {f"{section}.{name}": rule for name, rule in own.items()}
    return rules


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{show(v)}" for k, v in value.items()) + "}"
    return repr(value) if value == "" else str(value)
