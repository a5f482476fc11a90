"""LoRAConfig: what to adapt and how. It validates itself and reports every problem in one error."""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Number
from typing import Any

from typing_extensions import NotRequired

from lora_lightning.errors import ConfigError, did_you_mean
from lora_lightning.utils.pattern_kinds import problem
from lora_lightning.utils.peft_names import ALL_LINEAR, NAMES, peft_problem

INITS = ("default", "gaussian")
DETECTOR_PARTS = ("backbone", "neck", "all")
TRAIN_BIAS = ("none", "all", "lora_only")
TRAIN_NORM = ("frozen", "affine", "stats", "both")
IMPLEMENTATIONS = ("auto", "keep_inputs", "reference")


def _named(cls: type[LoRAConfig]) -> type[LoRAConfig]:
    """Let a name that is no option be one more problem of the configuration, not Python's TypeError."""
    plain = cls.__init__

    @functools.wraps(plain)
    def __init__(self: LoRAConfig, *values: Any, **options: Any) -> None:
        if not options.keys() <= cls.__dataclass_fields__.keys():
            raise ConfigError(cls.problems(options))
        plain(self, *values, **options)

    signature = inspect.signature(cls)
    cls.__signature__ = signature  # type: ignore[attr-defined]
    # LightningCLI hands over only what a signature has: with PEFT's names in it, the message is ours.
    theirs = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=NotRequired[Any]) for n in NAMES
    ]
    own = inspect.signature(plain).parameters.values()
    __init__.__signature__ = signature.replace(parameters=[*own, *theirs])  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_named
@dataclass
class LoRAConfig:
    """What is adapted, at which rank, and what else trains.

    Names and meanings follow PEFT's `LoraConfig` where it has them; `rank` is PEFT's `r` and `alpha`
    its `lora_alpha`. Its other names are refused with ours.

    Args:
        rank: r, the rank of the updates, at least 1; of a layer with a smaller side that side.
        alpha: numerator of the scaling alpha / rank, with the layer's own rank; None means 2 * rank.
        target_modules: "auto" (by the model's structure), "all" (every supported layer but the head),
            a list of names, or one regular expression that matches whole names. A name in a list is a
            whole one or an ending after a dot (`qkv`, `attn.qkv`), a glob (it has `*`, `?` or `[`), or a
            regular expression for either (it has one of `^ $ \\ ( ) | + { }`, or begins with `.*`).
        detector_part: the part of a detector to which `target_modules` is confined: "backbone", "neck" (with
            the feature pyramid) or "all" (with the RPN, the RoI heads, the towers of a head). None is "neck"
            for "auto" in torchvision's detectors, else "all".
        exclude_modules: layers to leave alone: a list of names, or a regular expression.
        modules_to_save: modules trained in full and saved with the adapter: "auto" finds the head;
            a list of names; None for none.
        backbone: name of the submodule to adapt and freeze; what lies outside it stays as it was.
            None takes `model.backbone` if there is one, else the whole model.
        rank_pattern: a name as in the lists -> rank. The most specific that matches wins: a plain name
            before a glob or a regular expression, then the one with more letters and digits.
        alpha_pattern: the same for alpha.
        dropout: probability of dropping an entry of the update's input, in [0, 1).
        init: how A begins: "default" (Kaiming uniform, as nn.Linear) or "gaussian" (std 1 / rank).
            B begins at zero, so that the outputs do not change at injection.
        use_rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).
        use_dora: train a magnitude for each output beside the direction (Liu et al. 2024,
            arXiv 2402.09353, equation 5).
        train_bias: "none", "all" (every bias in the backbone) or "lora_only" (of adapted layers).
        train_norm: normalization layers: "frozen", "affine" (weight and bias train), "stats" (running
            statistics move) or "both".
        implementation: how adapted layers compute: "auto" (the fast functions, which make some inputs again
            in the backward instead of saving them), "keep_inputs" (without the latter) or "reference" (plain
            autograd: slower, larger, the same results).

    Raises:
        ConfigError: one line for each bad option.
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: str | list[str] = "auto"
    detector_part: str | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = "auto"
    backbone: str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    init: str = "default"
    use_rslora: bool = False
    use_dora: bool = False
    train_bias: str = "none"
    train_norm: str = "frozen"
    implementation: str = "auto"

    def __post_init__(self) -> None:
        # Hydra hands over ListConfig and tuples: keep plain lists and dictionaries, which every
        # checkpoint can hold.
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            setattr(self, name, _plain_list(getattr(self, name)))
        for name in ("rank", "alpha", "dropout"):
            setattr(self, name, _plain_number(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = {key: _plain_number(number) for key, number in value.items()}
            setattr(self, name, {} if value is None else value)
        if problems := _value_problems(self):
            raise ConfigError(problems)

    @classmethod
    def problems(cls, options: Mapping[str, Any], prefix: str = "", beside: Iterable[str] = ()) -> list[str]:
        """Every problem of these options, unknown names and PEFT's included; an empty list when all is well.

        Args:
            prefix: what the names begin with where they are written, such as `lora.` on a command line.
            beside: other names that may be written there.
        """
        own = [f.name for f in fields(cls)]
        known = [*beside, *own]
        problems = [
            peft_problem(name, value, prefix)
            or f"{prefix}{name} is not an option of LoRA.{did_you_mean(name, known)}"
            f" Options: {', '.join(known)}."
            for name, value in options.items()
            if name not in own
        ]
        try:
            cls(**{k: v for k, v in options.items() if k in own})
        except ConfigError as error:
            problems += [f"{prefix}{problem}" for problem in error.problems]
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, fit for JSON and for `weights_only` loading."""
        return asdict(self)

    def scaling(self, rank: int, alpha: float | None) -> float:
        """s in W + s B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        alpha = 2 * rank if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _plain_number(value: Any) -> Any:
    """numpy's numbers, as sweeps draw them, as Python's."""
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def _plain_list(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):  # else each process would have an order of its own
        return sorted(value, key=str)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return list(value)
    return value


def _value_problems(config: LoRAConfig) -> list[str]:
    problems = [
        _whole("rank", config.rank),
        None if config.alpha is None else _positive("alpha", config.alpha),
        _names(
            "target_modules", config.target_modules, '"auto", "all", a list of names or globs, or a regex'
        ),
        None
        if config.exclude_modules is None
        else _names("exclude_modules", config.exclude_modules, "a list of names or globs, or a regex"),
        None
        if config.modules_to_save is None
        else _names("modules_to_save", config.modules_to_save, '"auto", null, or a list of names or globs'),
        None
        if config.backbone is None or (isinstance(config.backbone, str) and config.backbone)
        else f"backbone={config.backbone!r}: give the name of a submodule, such as 'encoder', or null.",
        None
        if config.detector_part is None
        else _choice("detector_part", config.detector_part, DETECTOR_PARTS),
        _fraction("dropout", config.dropout),
        _choice("init", config.init, INITS),
        _choice("train_bias", config.train_bias, TRAIN_BIAS),
        _choice("train_norm", config.train_norm, TRAIN_NORM),
        _choice("implementation", config.implementation, IMPLEMENTATIONS),
    ]
    for name in ("use_rslora", "use_dora"):
        if not isinstance(getattr(config, name), bool):
            problems.append(f"{name}={getattr(config, name)!r}: give true or false.")
    for name, check in (("rank_pattern", _whole), ("alpha_pattern", _positive)):
        pattern = getattr(config, name)
        if not isinstance(pattern, dict) or not all(isinstance(k, str) and k for k in pattern):
            problems.append(
                f"{name}={pattern!r}: give a mapping of layer names to numbers, such as {{qkv: 16}}."
            )
        else:
            problems += [check(f"{name}[{key!r}]", value) for key, value in pattern.items()]
            problems += [f"{name}: {key!r} {wrong}." for key in pattern if (wrong := problem(key))]
    return [p for p in problems if p]


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


def _whole(name: str, value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return None
    return f"{name}={value!r}: give a whole number of at least 1; 4 to 32 are usual."


def _positive(name: str, value: Any) -> str | None:
    if _is_number(value) and value > 0:
        return None
    return f"{name}={value!r}: give a number above 0, or null for twice the rank."


def _fraction(name: str, value: Any) -> str | None:
    if _is_number(value) and 0 <= value < 1:
        return None
    return f"{name}={value!r}: give a probability of at least 0 and below 1."


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    if isinstance(value, str) and value in allowed:
        return None
    return f"{name}={value!r}: give one of {', '.join(allowed)}.{did_you_mean(value, allowed)}"


def _names(name: str, value: Any, allowed: str) -> str | None:
    if value == ALL_LINEAR:
        return f"{name}={value!r} is PEFT's: here 'all' is every supported layer but the head."
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except re.error as error:
            return (
                f"{name}={value!r} is not a regular expression: {error}. For suffixes or globs give a list."
            )
        return None
    if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        return next((f"{name}: {v!r} {wrong}." for v in value if (wrong := problem(v))), None)
    return f"{name}={value!r}: give {allowed}."
