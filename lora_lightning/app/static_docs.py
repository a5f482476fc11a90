"""What a callable's source says of its options, read without importing it: a line of text and the default."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple

from lora_lightning.app.static_hints import constant_of
from lora_lightning.app.static_modules import absolute, binding, tree_of
from lora_lightning.utils.checks import options_of

DEEPEST = 12  # re-exports and base classes that are followed
UNKNOWN = object()


class Option(NamedTuple):
    """An option's first sentence in the docstring, and its default; UNKNOWN where there is none to read."""

    about: str = ""
    default: Any = UNKNOWN


def documented(of: str | type) -> dict[str, Option]:
    """The options of a dotted name, or of a dataclass that is at hand."""
    if not isinstance(of, str):
        about = {
            k: v
            for cls in reversed(of.__mro__)
            for k, v in _described(vars(cls).get("__doc__") or "").items()
        }
        own = fields(of) if is_dataclass(of) else ()
        return {
            f.name: Option(about.get(f.name, ""), UNKNOWN if f.default is MISSING else f.default) for f in own
        }
    module, _, name = of.rpartition(".")
    return _documented(module, name, DEEPEST)


def _documented(module: str, name: str, depth: int) -> dict[str, Option]:
    tree = tree_of(module)
    found = binding(tree, name) if tree and depth else None
    if isinstance(found, ast.ImportFrom):
        alias = next(a for a in found.names if (a.asname or a.name) == name)
        return _documented(absolute(module, found), alias.name, depth - 1)
    if isinstance(found, ast.ClassDef):
        about = _described(ast.get_docstring(found) or "")
        made = next((m for m in found.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
        if made is None:
            bases = [b.id for b in found.bases if isinstance(b, ast.Name)]
            return {k: v for b in bases for k, v in _documented(module, b, depth - 1).items()}
        return _shared(module, made, depth) | _of(module, made, about)
    if isinstance(found, ast.FunctionDef):
        own = _of(module, found, _described(ast.get_docstring(found) or ""))
        return _shared(module, found, depth) | own
    return {}


def _shared(module: str, node: ast.FunctionDef, depth: int) -> dict[str, Option]:
    """Those that a function takes from a class, by the decorator that says so."""
    found: dict[str, Option] = {}
    for decorator in node.decorator_list:
        match decorator:
            case ast.Call(func=ast.Name(id=maker), args=[ast.Name(id=kind)]) if maker == options_of.__name__:
                found |= _documented(module, kind, depth - 1)
    return found


def _of(module: str, node: ast.FunctionDef, about: dict[str, str]) -> dict[str, Option]:
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    pairs = [
        *zip(positional[len(positional) - len(a.defaults) :], a.defaults, strict=True),
        *((argument, default) for argument, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)),
    ]
    return {
        argument.arg: Option(about.get(argument.arg, ""), constant_of(module, default, UNKNOWN))
        for argument, default in pairs
    }


def _described(doc: str) -> dict[str, str]:
    """The first sentence on each name under `Args:`; several names may stand before one colon."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(doc) + "\n", re.MULTILINE)
    if not section:
        return {}
    indent = len(section[1]) - len(section[1].lstrip(" "))
    entries = re.split(rf"\n?^ {{{indent}}}(?=[\w*])", section[1], flags=re.MULTILINE)
    found = {}
    for entry in filter(None, entries):
        names, _, text = entry.partition(":")
        sentence = re.split(r"(?<!al\.)(?<=[.;])\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".;")
        found.update({name.strip().lstrip("*"): sentence for name in names.split(",")})
    return found
