"""What a callable takes, read from its source without importing it: imports of torch and timm take seconds.

Whatever is not plain (a decorator, a metaclass, a name bound twice) is left to the import.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

from lora_lightning.app.static_hints import declares, hint_of
from lora_lightning.app.static_modules import absolute, binding, bound_names, spec_of, tree_of
from lora_lightning.errors import did_you_mean
from lora_lightning.utils.checks import options_of, with_options
from lora_lightning.utils.marks import Check, check_of

PLAIN_DECORATORS = ("_defaults_from_env_vars", "override")  # they leave a signature as it is
DEEPEST = 12  # re-exports and base classes that are followed


def static_signature(target: str) -> inspect.Signature | None:
    """The signature of a dotted name, without the values of defaults. Types are there where the module
    declares by them what its options may be (`lora_lightning.utils.marks`), else Any.

    Returns:
        None where only an import can tell.
    """
    module, _, name = target.rpartition(".")
    return _signature(module, name, DEEPEST)


def static_checks(target: Any) -> dict[str, Check]:
    """The checks that a callable's source declares for its options; nothing is imported."""
    signature = static_signature(target) if isinstance(target, str) else None
    parameters = signature.parameters if signature else {}
    found = {name: check_of(parameter.annotation) for name, parameter in parameters.items()}
    return {name: check for name, check in found.items() if check}


def missing_name(target: str) -> str | None:
    """Why a dotted name cannot exist, when its module can be read and binds no such name."""
    module, _, name = target.rpartition(".")
    tree = tree_of(module)
    if tree is None or any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in tree.body):
        return None
    names = bound_names(tree)
    if name in names or "__getattr__" in names or spec_of(target) is not None:
        return None
    public = [n for n in names if not n.startswith("_")]
    return f"{module} has no {name!r}.{did_you_mean(name, public)}"


def _signature(module: str, name: str, depth: int) -> inspect.Signature | None:
    tree = tree_of(module)
    if tree is None or not depth:
        return None
    found = binding(tree, name)
    if isinstance(found, ast.ImportFrom):
        alias = next(a for a in found.names if (a.asname or a.name) == name)
        return _signature(absolute(module, found), alias.name, depth - 1)
    if isinstance(found, ast.FunctionDef):
        return _of_function(module, found)
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
        whole = _of_function(module, methods["__init__"])
        return whole and whole.replace(parameters=list(whole.parameters.values())[1:])
    if not node.bases:
        return inspect.Signature()
    if len(node.bases) == 1 and isinstance(base := node.bases[0], ast.Name):
        return _signature(module, base.id, depth - 1)
    return None


def _of_function(module: str, node: ast.FunctionDef) -> inspect.Signature | None:
    own: inspect.Signature | None = _written(module, node)
    for decorator in node.decorator_list:
        match decorator:
            case ast.Name(id=name) if name in PLAIN_DECORATORS:
                continue
            case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=kind)]) if name == options_of.__name__:
                of = _signature(module, kind, DEEPEST)
                own = own and of and with_options(own, of)
            case _:
                return None
    return own


def _written(module: str, node: ast.FunctionDef) -> inspect.Signature:
    a, kinds = node.args, inspect.Parameter
    tree = tree_of(module)
    typed = tree is not None and declares(module, tree)

    def parameter(argument: ast.arg, kind: inspect._ParameterKind, required: bool) -> inspect.Parameter:
        return kinds(
            argument.arg,
            kind,
            default=kinds.empty if required else None,
            annotation=hint_of(module, argument.annotation if typed else None),
        )

    positional = [*a.posonlyargs, *a.args]
    without = len(positional) - len(a.defaults)
    found = [
        parameter(
            argument,
            kinds.POSITIONAL_ONLY if argument in a.posonlyargs else kinds.POSITIONAL_OR_KEYWORD,
            position < without,
        )
        for position, argument in enumerate(positional)
    ]
    if a.vararg:
        found.append(kinds(a.vararg.arg, kinds.VAR_POSITIONAL))
    found += [
        parameter(argument, kinds.KEYWORD_ONLY, default is None)
        for argument, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    if a.kwarg:
        found.append(kinds(a.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)
