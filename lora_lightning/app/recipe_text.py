"""Recipes as texts: their descriptions, what they begin with, and their values with the comments on them.
Loads neither Hydra nor torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lora_lightning.errors import AdapterFileError
from lora_lightning.utils.mapping_file import read_mapping, read_text

PACKAGE_LINE = re.compile(r"#\s*@package\s+_global_\s*$")
Path_ = tuple[str, ...]  # of a value in a file: ("lora", "rank")


class Written(NamedTuple):
    """A value as a file has it: its text, the comment lines above it and the comment behind it."""

    text: str
    above: tuple[str, ...] = ()
    beside: str = ""


def is_recipe(file: Path) -> bool:
    """Whether a file begins as recipes do."""
    try:
        first = read_text(file, "").partition("\n")[0]
    except AdapterFileError:
        return False
    return PACKAGE_LINE.match(first) is not None


def header(text: str) -> list[str]:
    """The comment lines in which a recipe begins, without their marks and without Hydra's line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not PACKAGE_LINE.match(line):
            lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return lines


def description(text: str) -> str:
    """The first sentence of the comment in which a recipe begins."""
    lines = header(text)
    end = next((i for i, line in enumerate(lines) if not line), len(lines))
    return re.split(r"(?<=[.!])\s", " ".join(lines[:end]), maxsplit=1)[0].rstrip(".")


def begun_with(file: Path) -> list[Path]:
    """A recipe and those of its folder that it begins with, the last of them first.

    Raises:
        AdapterFileError: one of them is no configuration.
    """
    found = [file]
    while True:
        defaults = read_mapping(found[0], "").get("defaults") or []
        names = [name for name in defaults if isinstance(name, str) and name != "_self_"]
        parents = [p for name in names if (p := file.with_name(f"{name}.yaml")).is_file() and p not in found]
        if not parents:
            return found
        found[:0] = parents


def choices(files: Sequence[Path]) -> dict[str, str]:
    """What recipes choose of the groups, by the group; a later file's choice replaces an earlier one's."""
    chosen = {}
    for file in files:
        for default in read_mapping(file, "").get("defaults") or []:
            for key, value in default.items() if isinstance(default, dict) else ():
                group = str(key).removeprefix("override").strip().lstrip("/")
                chosen[group] = "null" if value is None else str(value)
    return chosen


def written(text: str) -> dict[Path_, Written]:
    """Every value of a YAML file by its path, the lists and flow mappings whole; a section's own entry has
    the comments on its name and no text."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return dict(_written(root, text, text.splitlines(), ())) if root is not None else {}


def _written(node: yaml.Node, text: str, lines: list[str], path: Path_) -> Iterator[tuple[Path_, Written]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        above = _above(lines, key.start_mark.line)
        if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
            yield here, Written("", above, _beside(lines[key.end_mark.line], key.end_mark.column + 1))
            yield from _written(value, text, lines, here)
        elif _is_block(value):
            yield here, Written(flow(_plain(value)), above)
        else:
            raw = text[value.start_mark.index : value.end_mark.index]
            end = value.end_mark if raw else key.end_mark
            yield here, Written(raw or "null", above, _beside(lines[end.line], end.column))


def _is_block(node: yaml.Node) -> bool:
    """Whether a value stands on lines of its own, below its name."""
    if isinstance(node, yaml.ScalarNode):
        return node.style in ("|", ">")
    return isinstance(node, yaml.SequenceNode) and not node.flow_style


def _above(lines: list[str], at: int) -> tuple[str, ...]:
    found: list[str] = []
    while at > len(found) and (line := lines[at - 1 - len(found)].strip()).startswith("#"):
        found.insert(0, line.lstrip("#").strip())
    return () if len(found) == at else tuple(found)  # the header is of the whole file


def _beside(line: str, column: int) -> str:
    rest = line[column:].strip()
    return rest.lstrip("#").strip() if rest.startswith("#") else ""


def _plain(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    return loader.construct_object(node, deep=True)


def flow(value: Any) -> str:
    """A value as it is written in one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()
