"""Which layers the patterns of a configuration mean, and near misses; `pattern_kinds` has one by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import did_you_mean
from lora_lightning.planning.plan import LayerPlan, summary
from lora_lightning.planning.structure import Target, targets_of
from lora_lightning.utils.names import named_modules
from lora_lightning.utils.pattern_kinds import alone, exactly, means, specificity
from lora_lightning.utils.tables import truncate_list


def matches(name: str, patterns: str | list[str]) -> bool:
    """Whether a dotted name is meant: a string is a regular expression for the whole name, a list holds
    names (`qkv`, `attn.qkv`), globs (`blocks.*.fc?`) or regular expressions, for names or endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(means(pattern, name) for pattern in patterns)


def matching(
    option: str,
    patterns: str | list[str],
    names: Mapping[str, Target | None],
    problems: list[str],
    refused: Mapping[str, str] | None = None,
) -> list[str]:
    """The names that match; every pattern must match at least one, or it becomes a problem."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        one: str | list[str] = pattern if isinstance(patterns, str) else [pattern]
        if any(_meant(n, t, one) for n, t in names.items()):
            continue
        unsupported = {n: r for n, r in (refused or {}).items() if matches(n, one)}
        if unsupported:
            problems.append(
                f"{option}: {pattern!r} matches {summary(unsupported)}, which cannot be adapted: name others."
            )
        else:
            remedy = _near(one, names)
            problems.append(f"{option}: {pattern!r} matches no layer.{remedy}")
    return [n for n, t in names.items() if _meant(n, t, patterns)]


def _meant(name: str, target: Target | None, patterns: str | list[str]) -> bool:
    """A module's name means all its weights, but not the parts of them."""
    if matches(name, patterns):
        return True
    return target is not None and not target.slot.part and matches(target.module, patterns)


def _near(pattern: str | list[str], names: Mapping[str, Target | None]) -> str:
    """Near misses among the names' endings: `blocks.0.attn.qkv` can be meant by `qkv` or `attn.qkv`."""
    word = pattern if isinstance(pattern, str) else pattern[0]
    if word.startswith("all"):  # PEFT's "all-linear"
        return " Did you mean 'all'?"
    endings = {e: None for n, t in names.items() for e in _endings(n, t)}
    if isinstance(pattern, str) and any(_meant(n, t, [pattern]) for n, t in names.items()):
        return f" A string is a regular expression for whole names: for an ending give a list, [{word!r}]."
    near = did_you_mean(word.removeprefix(".*"), [*endings, "auto"])
    shortest = {(t is not None and t.slot.part, _endings(n, t)[0]) for n, t in names.items()}
    return near or f" Layers here: {truncate_list([ending for _, ending in sorted(shortest)], most=12)}."


def _endings(name: str, target: Target | None) -> list[str]:
    """Endings by which a name can be meant, shortest first: `mlp.0` and `block.mlp.0`, since `0` alone
    says nothing; `qkv.v` for a part; `convs.*.0` for layers that repeat."""
    parts = re.sub(r"\.\d+(?=\.)", ".*", name).split(".")
    start = len(parts) - 1 - (target is not None and target.slot.part)
    while start > 0 and not parts[start].isidentifier():
        start -= 1
    return [".".join(parts[i:]) for i in (start, start - 1) if i >= 0 and parts[i].isidentifier()] or [name]


def lookup(
    option: str, values: Mapping[str, Any], targets: Mapping[str, Target], problems: list[str]
) -> Callable[[str], tuple[str, Any] | None]:
    """A function name of a target -> the most specific key that means it, and its value; None without one."""
    keys = sorted(values, key=specificity, reverse=True)
    for key in keys:
        if targets and not any(_meant(n, t, [key]) for n, t in targets.items()):
            remedy = _near([key], targets)
            problems.append(f"{option}: {key!r} matches no adapted layer.{remedy}")
    return lambda name: next(((k, values[k]) for k in keys if _meant(name, targets[name], [k])), None)


def naming(config: LoRAConfig, layers: list[LayerPlan], heads: list[str], model: nn.Module) -> LoRAConfig:
    """The configuration by which these layers, their ranks and heads, and no others are chosen.

    Args:
        model: the plain backbone, which has these names.
    """
    known = {*targets_of(model)[0], *named_modules(model)}
    return keyed(config, layers, heads, lambda name: alone(name, known))


def keyed(
    config: LoRAConfig, layers: list[LayerPlan], heads: list[str], key: Callable[[str], str]
) -> LoRAConfig:
    """`naming` by patterns that a function gives for the names."""
    ranks = {key(p.name): p.rank for p in layers if p.rank != config.rank}
    return replace(
        config,
        target_modules=[key(p.name) for p in layers] or config.target_modules,
        modules_to_save=[key(h) for h in heads] or None,
        rank_pattern=ranks,
        alpha_pattern={
            key(p.name): p.alpha
            for p in layers
            if p.alpha != (config.default_alpha(p.rank) if config.alpha is None else config.alpha)
        },
    )


def renamed_in(config: LoRAConfig, names: list[str], rename: Callable[[str], str]) -> LoRAConfig:
    """The same configuration for a model that holds these names a level up or down. Whole names change;
    endings fit both."""
    new = {exactly(name): exactly(rename(name)) for name in names}
    new.update({name: exactly(rename(name)) for name in names if len(rename(name)) < len(name)})

    def each(patterns: Any) -> Any:
        return [new.get(p, p) for p in patterns] if isinstance(patterns, list) else patterns

    return replace(
        config,
        target_modules=each(config.target_modules),
        exclude_modules=each(config.exclude_modules),
        modules_to_save=each(config.modules_to_save),
        rank_pattern={new.get(k, k): v for k, v in config.rank_pattern.items()},
        alpha_pattern={new.get(k, k): v for k, v in config.alpha_pattern.items()},
    )
