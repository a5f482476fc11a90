"""Names and what is meant by them: suffixes, globs, regular expressions, and near misses."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_lightning.errors import did_you_mean
from lora_lightning.plans import summary
from lora_lightning.report import listed
from lora_lightning.structure import Target


def matches(name: str, patterns: str | list[str]) -> bool:
    """Whether a dotted name is meant: a string is a regular expression for the whole name, a list
    holds suffixes (`qkv`, `attn.qkv`) or globs (`blocks.*.fc?`)."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(_matches_one(name, pattern) for pattern in patterns)


def _matches_one(name: str, pattern: str) -> bool:
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


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
            problems.append(f"{option}: {pattern!r} matches {summary(unsupported)}, which cannot be adapted.")
        else:
            problems.append(f"{option}: {pattern!r} matches no layer.{_near(one, names)}")
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
    return near or f" Layers here: {listed([ending for _, ending in sorted(shortest)], most=12)}."


def _endings(name: str, target: Target | None) -> list[str]:
    """Endings by which a name can be meant, shortest first: `mlp.0` and `block.mlp.0`, since `0` alone
    says nothing; `qkv.v` for a part; `convs.*.0` for layers that repeat."""
    parts = re.sub(r"\.\d+(?=\.)", ".*", name).split(".")
    start = len(parts) - 1 - (target is not None and target.slot.part)
    while start > 0 and not parts[start].isidentifier():
        start -= 1
    return [".".join(parts[i:]) for i in (start, start - 1) if i >= 0 and parts[i].isidentifier()] or [name]


def lookup(
    option: str, pattern: Mapping[str, Any], names: list[str], problems: list[str]
) -> Callable[[str], Any]:
    """A function name -> value of the longest key that matches, or None."""
    keys = sorted(pattern, key=len, reverse=True)
    for key in keys:
        if names and not any(_pattern_matches(n, key) for n in names):
            near = _near([key], dict.fromkeys(names))
            problems.append(f"{option}: {key!r} matches no adapted layer.{near}")
    return lambda name: next((pattern[k] for k in keys if _pattern_matches(name, k)), None)


def _pattern_matches(name: str, key: str) -> bool:
    if matches(name, [key]):
        return True
    try:
        return matches(name, rf"(?:.*\.)?(?:{key})")
    except re.error:  # a glob such as `*.qkv` is no regular expression
        return False
