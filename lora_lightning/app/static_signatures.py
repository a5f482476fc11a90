"""What a callable takes, read from its source without importing it: imports of torch and timm take seconds.

Whatever is not plain (a decorator, a metaclass, a name bound twice) is left to the import.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from lora_lightning.errors import did_you_mean

PLAIN_DECORATORS = ("_defaults_from_env_vars", "override")  # they leave a signature as it is
DEEPEST = 12  # re-exports and base classes that are followed


def static_signature(target: str) -> inspect.Signature | None:
    """The signature of a dotted name, without its types and values of defaults.

    Returns:
        None where only an import can tell.
    """
    module, _, name = target.rpartition(".")
    return _signature(module, name, DEEPEST)


def missing_name(target: str) -> str | None:
    """Why a dotted name cannot exist, when its module can be read and binds no such name."""
    module, _, name = target.rpartition(".")
    read = _read(module)
    if read is None:
        return None
    tree, names = read
    if any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in tree.body):
        return None
    if name in names or "__getattr__" in names or _spec(target) is not None:
        return None
    public = [n for n in names if not n.startswith("_")]
    return f"{module} has no {name!r}.{did_you_mean(name, public)}"


def _signature(module: str, name: str, depth: int) -> inspect.Signature | None:
    read = _read(module)
    if read is None or not depth:
        return None
    tree, bindings = read
    binding = bindings.get(name, [])
    if len(binding) != 1 or binding[0] not in tree.body:
        return None
    found = binding[0]
    if isinstance(found, ast.ImportFrom):
        alias = next(a for a in found.names if (a.asname or a.name) == name)
        return _signature(_absolute(module, found), alias.name, depth - 1)
    if isinstance(found, ast.FunctionDef):
        return _of_function(found)
    if isinstance(found, ast.ClassDef):
        return _of_class(module, found, depth)
    return None


def _of_class(module: str, node: ast.ClassDef, depth: int) -> inspect.Signature | None:
    if node.decorator_list or node.keywords:
        return None
    methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
    if "__new__" in methods:
        return None
    if "__init__" in methods:
        whole = _of_function(methods["__init__"])
        return whole and whole.replace(parameters=list(whole.parameters.values())[1:])
    if len(node.bases) == 1 and isinstance(base := node.bases[0], ast.Name):
        return _signature(module, base.id, depth - 1)
    return None


def _of_function(node: ast.FunctionDef) -> inspect.Signature | None:
    if any(not isinstance(d, ast.Name) or d.id not in PLAIN_DECORATORS for d in node.decorator_list):
        return None
    a, kinds = node.args, inspect.Parameter
    positional = [*a.posonlyargs, *a.args]
    without = len(positional) - len(a.defaults)
    found = [
        kinds(
            argument.arg,
            kinds.POSITIONAL_ONLY if argument in a.posonlyargs else kinds.POSITIONAL_OR_KEYWORD,
            default=kinds.empty if position < without else None,
        )
        for position, argument in enumerate(positional)
    ]
    if a.vararg:
        found.append(kinds(a.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        found.append(
            kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
        )
    if a.kwarg:
        found.append(kinds(a.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def _bound(statement: ast.AST) -> Iterator[str]:
    """The names that a statement binds, wherever it stands."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (a.asname or a.name.partition(".")[0] for a in statement.names)
    elif isinstance(statement, ast.Name) and isinstance(statement.ctx, ast.Store):
        yield statement.id


def _absolute(module: str, found: ast.ImportFrom) -> str:
    if not found.level:
        return found.module or ""
    spec = _spec(module)
    package = module if spec and spec.submodule_search_locations else module.rpartition(".")[0]
    for _ in range(found.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{found.module}" if found.module else package


def _read(module: str) -> tuple[ast.Module, dict[str, list[ast.AST]]] | None:
    """What the module's file holds, and the statements that bind each name."""
    spec = _spec(module)
    return _parsed(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@functools.lru_cache(maxsize=64)
def _parsed(file: str) -> tuple[ast.Module, dict[str, list[ast.AST]]] | None:
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    bindings: dict[str, list[ast.AST]] = {}
    for statement in ast.walk(tree):
        for name in dict.fromkeys(_bound(statement)):
            bindings.setdefault(name, []).append(statement)
    return tree, bindings


def _spec(module: str) -> ModuleSpec | None:
    """Where a module lies; other than importlib's own `find_spec` it imports no parent."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        return None
    name = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None or not part:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec
