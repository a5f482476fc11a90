"""What is given where a LoRAConfig belongs: a LoRAConfig, its fields in a mapping, or PEFT's LoraConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from itertools import combinations
from typing import Any

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError
from lora_lightning.utils.peft_names import NEUTRAL, PEFT_OPTIONS, VARIANTS, init_of, peft_problem

HEADS = ("classifier", "score", "qa_outputs")  # what PEFT trains beside, by task_type
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
ALLOWED = "a LoRAConfig, a mapping of its fields, or PEFT's LoraConfig"


def config_of(given: Any, option: str = "config") -> LoRAConfig:
    """A LoRAConfig from what was given in its place.

    PEFT's `LoraConfig`, and the mapping that its `to_dict` gives, is converted: the result adapts the same
    layers at the same ranks and scalings. A mapping without `peft_type` holds our names.

    Args:
        given: None takes the defaults.
        option: what it was given as, for the message.

    Raises:
        ConfigError: neither of these, or with options that mean nothing here; every problem at once.
    """
    if given is None:
        return LoRAConfig()
    if isinstance(given, LoRAConfig):
        return given
    if is_dataclass(given) and not isinstance(given, type) and hasattr(given, "peft_type"):
        return _of_peft(asdict(given))
    if isinstance(given, Mapping):
        options = {str(name): value for name, value in given.items()}
        return _of_peft(options) if options.get("peft_type") else LoRAConfig(**options)
    raise ConfigError([f"{option}={given!r}: give {ALLOWED}."])


def variant_problems(about: Mapping[str, Any], remedy: str) -> list[str]:
    """What PEFT's options ask for that does not exist here, one line each, with this remedy."""
    if about["peft_type"] != "LORA":
        return [f"peft_type={about['peft_type']!r}: only LORA can be read here. {remedy}".rstrip()]
    known = {*NEUTRAL, *PEFT_OPTIONS, *VARIANTS}
    problems = [f"{k}={about[k]!r}: {why}. {remedy}" for k, why in VARIANTS.items() if about.get(k)]
    return problems + [
        f"{name}={value!r}: this variant of LoRA does not exist here. {remedy}"
        for name, value in about.items()
        if name not in known and value
    ]


def settings_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The options of PEFT that mean the same here whatever the model is, under our names."""
    return {
        "rank": about.get("r", 8),
        "alpha": about.get("lora_alpha", 8),
        "dropout": about.get("lora_dropout", 0.0),
        "use_rslora": about.get("use_rslora", False),
        "use_dora": about.get("use_dora", False),
        "train_bias": about.get("bias", "none"),
    }


def _of_peft(about: Mapping[str, Any]) -> LoRAConfig:
    about = {name: value.value if isinstance(value, Enum) else value for name, value in about.items()}
    problems = variant_problems(about, "Give a LoRAConfig without it.")
    if about["peft_type"] != "LORA":
        raise ConfigError(problems)
    for name in ("layers_to_transform", "layers_pattern"):
        if about.get(name) is not None:
            problems.append(str(peft_problem(name, about[name])))
    init = init_of(about.get("init_lora_weights", True))
    if init is None:
        problems.append(str(peft_problem("init_lora_weights", about["init_lora_weights"])))
    if about.get("inference_mode"):
        remedy = peft_problem("inference_mode", True)
        problems.append(f"inference_mode=True: nothing would train. {remedy}")
    for name in ("rank_pattern", "alpha_pattern"):
        problems += _ambiguous(name, about.get(name) or {})
    options = {
        **settings_of(about),
        "target_modules": _listed(about.get("target_modules") or "auto"),
        "exclude_modules": _listed(about.get("exclude_modules") or None),
        "modules_to_save": _heads(about, problems),
        "rank_pattern": about.get("rank_pattern"),
        "alpha_pattern": about.get("alpha_pattern"),
        "init": init or "default",
    }
    problems += LoRAConfig.problems(options)
    if problems:
        raise ConfigError([f"of PEFT's LoraConfig: {problem}" for problem in problems])
    return LoRAConfig(**options)


def _heads(about: Mapping[str, Any], problems: list[str]) -> Any:
    """With a task_type, PEFT trains the head without being told its name."""
    named = _listed(about.get("modules_to_save") or None)
    if about.get("task_type") not in HEAD_TASKS:
        return named
    if named and not any(head.rpartition(".")[2] in HEADS for head in named):
        problems.append(
            f"task_type={about['task_type']!r} trains the head beside modules_to_save={named!r}: "
            "give a LoRAConfig whose modules_to_save names all of them."
        )
    return named or "auto"


def _listed(names: Any) -> Any:
    """PEFT makes sets of lists; in an order of their own they would differ from run to run."""
    return sorted(names) if isinstance(names, (set, frozenset)) else names


def _ambiguous(option: str, pattern: Mapping[str, Any]) -> list[str]:
    """Of two patterns for one layer PEFT takes the first, here the more specific one counts."""
    for (one, value), (other, second) in combinations(pattern.items(), 2):
        if value != second and not _apart(one, other):
            return [
                f"{option}: {one!r} and {other!r} may both match a layer: PEFT takes the first, here "
                "the more specific one counts. Give a LoRAConfig with the names of the layers."
            ]
    return []


def _apart(one: str, other: str) -> bool:
    """Whether no layer's name can end in both: plain names, neither the ending of the other."""
    one, other = (text.strip("^$").replace("\\.", ".") for text in (one, other))
    plain = all(part.isidentifier() or part.isdigit() for part in f"{one}.{other}".split("."))
    return plain and not (f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}"))
