"""Modules as syntax trees, found and read without importing them: what a name in one is bound to."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)  # names bound within are their own


def tree_of(module: str) -> ast.Module | None:
    """The syntax tree of a module; None where it has no source."""
    spec = spec_of(module)
    return _parsed(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@functools.lru_cache(maxsize=64)
def _parsed(file: str) -> ast.Module | None:
    try:
        return ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def spec_of(module: str) -> ModuleSpec | None:
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


def binding(tree: ast.Module, name: str) -> ast.AST | None:
    """The one statement at the top of a module that binds a name; None where it is bound twice or within a
    condition, which only an import can tell."""
    found = _bindings(tree).get(name, [])
    return found[0] if len(found) == 1 and found[0] in tree.body else None


@functools.lru_cache(maxsize=64)
def bound_names(tree: ast.Module) -> set[str]:
    """Every name that is bound anywhere in a module, within functions too: one may be declared global."""
    return {name for statement in ast.walk(tree) for name in _bound(statement)}


@functools.lru_cache(maxsize=64)
def _bindings(tree: ast.Module) -> dict[str, list[ast.AST]]:
    """By name the statements that bind it for the module: not those within functions and classes."""
    found: dict[str, list[ast.AST]] = {}
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        statement = waiting.pop()
        for name in _bound(statement):
            found.setdefault(name, []).append(statement)
        if not isinstance(statement, (*SCOPES, ast.Assign, ast.AnnAssign)):
            waiting += ast.iter_child_nodes(statement)
    return found


def _bound(statement: ast.AST) -> Iterator[str]:
    """The names that a statement itself binds."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (a.asname or a.name.partition(".")[0] for a in statement.names)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (name for target in targets for inner in ast.walk(target) for name in _bound(inner))
    elif isinstance(statement, ast.Name) and isinstance(statement.ctx, ast.Store):
        yield statement.id


def absolute(module: str, found: ast.ImportFrom) -> str:
    """The module that a `from … import` of another one means."""
    if not found.level:
        return found.module or ""
    spec = spec_of(module)
    package = module if spec and spec.submodule_search_locations else module.rpartition(".")[0]
    for _ in range(found.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{found.module}" if found.module else package
