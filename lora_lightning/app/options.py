"""What the options of the application itself may be, and those of Lightning's classes, which declare nothing:
one table of checks by dotted name. All other options are declared by the classes that have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lora_lightning.app.compress_options import CHECKS
from lora_lightning.app.export_options import CHECKS as EXPORT
from lora_lightning.app.methods import METHODS
from lora_lightning.app.static_signatures import static_checks, static_signature
from lora_lightning.config import LoRAConfig
from lora_lightning.tasks.optim_config import OptimConfig, ScheduleConfig
from lora_lightning.utils.checks import Options, checks_of
from lora_lightning.utils.marks import (
    FLAG,
    TEXT,
    Check,
    above,
    at_least,
    between,
    check_of,
    is_number,
    is_whole,
    listed,
    matching,
    number,
    one_of,
    whole,
)

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


def _is_part(value: Any) -> bool:
    """Of batches: a number of them, also written 2.0, or a fraction."""
    return is_number(value) and (0 <= value <= 1 or (value > 1 and value == int(value)))


def _is_duration(value: Any) -> bool:
    if isinstance(value, dict):  # of datetime.timedelta's arguments
        return bool(value) and all(is_number(v) for k, v in value.items() if k != "_target_")
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


TEXTS = listed("a list of words, such as [first,tuned]", TEXT, least=0)
ARTIFACT = matching(r"[\w.-]{1,128}", "a name of letters, digits, -, _ and .")  # as W&B takes it
COMPARED = listed(
    f"a list of methods, each once, of {', '.join(METHODS)}; [] for none",
    one_of(*METHODS),
    least=0,
    distinct=True,
).or_null()
RATE = number(above(0, note="1e-4 to 1e-1 are usual"))
UNBOUNDED = Check(
    "a whole number of at least 1, or -1 for no limit",
    lambda v: is_whole(v) and (v >= 1 or v == -1),
)
PART = Check(
    "a whole number of batches, a fraction from 0.0 to 1.0 of them, or null for all",
    lambda v: v is None or _is_part(v),
)
DEVICES = Check(
    "a whole number of at least 1, -1 or auto for all, or a list of their numbers, such as [0,2]",
    lambda v: (
        (v := devices_of(v)) in ("auto", -1)
        or (is_whole(v) and v >= 1)
        or (
            isinstance(v, list)
            and len(set(map(str, v))) == len(v) > 0
            and all(is_whole(d) and d >= 0 for d in v)
        )
    ),
)
PRECISION = Check(
    f"one of {', '.join(PRECISIONS)}, or for short {', '.join(SHORT_PRECISIONS)}, or null",
    lambda v: v is None or precision_of(v) in PRECISIONS,
    (*PRECISIONS, *SHORT_PRECISIONS),
)
TIME = Check(
    "a time as DD:HH:MM:SS, a mapping such as {hours:5}, or null",
    lambda v: v is None or _is_duration(v),
)
MAPPING = Check("a mapping, or null", lambda v: v is None or isinstance(v, dict))

RULES: dict[str, Check] = {
    "seed": whole(between(0, 2**32 - 1)),
    "threads": whole(at_least(1)).or_null(),
    "ckpt_path": TEXT.or_null(),
    "tags": TEXTS,
    "method": one_of(*METHODS),
    "tune": one_of("lr", "rank", several=True).or_null(),
    "search.study": matching(r"[\w.-]+", "a name of letters, digits, _, - and .").or_null(),
    "search.storage": TEXT.or_null(),
    "search.trials": whole(at_least(1)),
    "search.fraction": number(between(0.001, 1, noun="a fraction")),
    "search.prune": FLAG,
    "tuning.points": whole(between(2, 25)),
    "tuning.factor": number(above(1, note="2 or 3 are usual")),
    "tuning.most": whole(at_least(2)),
    "tuning.fraction": number(between(0.001, 1, noun="a fraction")),
    "compare": COMPARED,
    "adapters": MAPPING,
    **{f"rates.{method}": RATE for method in METHODS},
    **{f"compress.{name}": check for name, check in CHECKS.items()},
    **{f"export.{name}": check for name, check in EXPORT.items()},
    "run_dir": TEXT,
    "optim.rate_scale": number(above(0)),
    "lora.quantize": static_checks("lora_lightning.adapters.quantize.quantize")["kind"].or_null(),
    "lora.spectra": one_of("layers", "mean", "none"),
    "trainer.accelerator": one_of(*ACCELERATORS),
    "trainer.devices": DEVICES,
    "trainer.num_nodes": whole(at_least(1)),
    "trainer.precision": PRECISION,
    "trainer.max_epochs": UNBOUNDED.or_null(),
    "trainer.max_steps": UNBOUNDED,
    "trainer.max_time": TIME,
    "trainer.accumulate_grad_batches": whole(at_least(1)),
    "trainer.gradient_clip_val": number(at_least(0)).or_null(),
    "trainer.check_val_every_n_epoch": whole(at_least(1)).or_null(),
    "trainer.val_check_interval": Check(
        "a whole number of batches, a fraction of an epoch up to 1.0, a time as DD:HH:MM:SS, or null",
        lambda v: v is None or (_is_part(v) and v > 0) or _is_duration(v),
    ),
    "trainer.limit_train_batches": PART,
    "trainer.limit_val_batches": PART,
    "trainer.limit_test_batches": PART,
    "trainer.overfit_batches": Check(
        "a whole number of batches, or a fraction from 0.0 to 1.0 of them; 0 for none", _is_part
    ),
    "trainer.log_every_n_steps": whole(at_least(0)).or_null(),
    "trainer.num_sanity_val_steps": whole(at_least(-1)).or_null(),
    "trainer.deterministic": Check(
        "true, false, warn or null", lambda v: v is None or isinstance(v, bool) or v == "warn"
    ),
    "trainer.benchmark": FLAG.or_null(),
    "trainer.enable_progress_bar": FLAG.or_null(),
    "callbacks.checkpoint": MAPPING,
    "callbacks.last": MAPPING,
    "callbacks.last.dirpath": TEXT,
    "callbacks.last.filename": TEXT.or_null(),
    "callbacks.last.save_on_train_epoch_end": FLAG,
    "callbacks.preemption": MAPPING,
    "callbacks.learning_rate": MAPPING,
    "callbacks.checkpoint.dirpath": TEXT,
    "callbacks.checkpoint.filename": TEXT.or_null(),
    "callbacks.checkpoint.monitor": TEXT.or_null(),
    "callbacks.checkpoint.mode": one_of("min", "max").or_null("whichever is better of the score"),
    "callbacks.checkpoint.save_top_k": whole(at_least(-1)),
    "callbacks.checkpoint.save_last": FLAG.or_null(),
    "callbacks.checkpoint.save_weights_only": FLAG,
    "callbacks.early_stopping": MAPPING,
    "callbacks.early_stopping.monitor": TEXT,
    "callbacks.early_stopping.mode": one_of("min", "max").or_null("whichever is better of the score"),
    "callbacks.early_stopping.patience": whole(at_least(0)),
    "callbacks.early_stopping.min_delta": number(at_least(0)),
    "callbacks.ema": MAPPING,
    "callbacks.gradient_norm": MAPPING,
    "callbacks.device_stats": MAPPING,
    "callbacks.model_summary": MAPPING,
    "callbacks.learning_rate.logging_interval": one_of("step", "epoch").or_null(),
    "logger.choose": FLAG,
    "logger.csv": MAPPING,
    "logger.tensorboard": MAPPING,
    **{f"logger.{name}": MAPPING for name in ("wandb", "mlflow", "comet", "aim")},
}

REQUIRED = ("model", "data", "task", "lora", "optim", "schedule", "trainer", "rates", "tuning")
OPTIONAL = ("callbacks", "compress", "export", "logger", "speedups", "search")
SEVERAL = ("callbacks",)  # groups of which a list may be chosen

# Arguments that the application passes itself, and what to do instead.
FACTS = (
    "num_classes", "class_names", "target", "class_weights", "logit_adjustment", "number_mean", "number_std",
    "vocabulary", "kept",
)  # fmt: skip
OF_THE_DATA = dict.fromkeys(FACTS, "the data decides")
PROVIDED: dict[str, dict[str, str]] = {
    "model": OF_THE_DATA,
    "optim": {"schedule": "use schedule=NAME"},
    "task": {**OF_THE_DATA, "model": "use model=NAME", "optim": "use optim.KEY=VALUE"},
    "trainer": {
        "logger": "use logger=NAME",
        "plugins": "it writes checkpoints whole",
        "callbacks": "use +callbacks.NAME._target_=CLASS",
        "default_root_dir": "use hydra.run.dir=FOLDER",
        "enable_model_summary": "the plan is printed instead",
    },
}

# Sections whose options are a class's fields, and what else may be written there.
OWN: dict[str, type[Options]] = {"lora": LoRAConfig, "optim": OptimConfig, "schedule": ScheduleConfig}


def options_in(section: str, target: Any = None) -> dict[str, Check | None]:
    """What a section of the configuration takes, and what each option may be, where that is declared. Nothing
    is imported: what the source does not tell is left out.

    Args:
        section: dotted, such as `data` or `callbacks.checkpoint`.
        target: its `_target_`.
    """
    if section in OWN:
        own: Any = OWN[section]
        names = [one.name for one in fields(own) if one.name not in PROVIDED.get(section, {})]
        return {name: checks_of(own).get(name) for name in names}
    signature = static_signature(target) if isinstance(target, str) else None
    return {
        name: check_of(parameter.annotation)
        for name, parameter in (signature.parameters.items() if signature else ())
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in PROVIDED.get(section, {})
    }


def checks_in(values: Mapping[str, Any]) -> dict[str, Check]:
    """Every check of a configuration's options by dotted name: those of the table, and those that the classes
    of its model, its data and its task declare in their source."""
    found = dict(RULES)
    for section in ("model", "data", "task", "speedups"):
        if isinstance(node := values.get(section), Mapping):
            own = options_in(section, node.get("_target_"))
            found |= {f"{section}.{name}": check for name, check in own.items() if check}
    return found
