"""What an annotation says, read from its source without importing it: types, and the marks of
`lora_lightning.utils.marks` on them.

Nothing is executed but those marks' own functions, on constants. The rest is left to the import.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import math
import operator
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union

from lora_lightning.app.static_modules import absolute, binding, tree_of
from lora_lightning.utils import marks
from lora_lightning.utils.marks import is_number

DEEPEST = 8  # names that are followed from module to module
STANDARD = ("typing", "typing_extensions", "collections.abc")  # what types are made of: they load at once
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}  # fmt: skip
LARGEST = 64  # of an exponent: a constant is read at once or not at all


class Unreadable(Exception):
    """Only an import can tell."""


def declares(module: str, tree: ast.Module) -> bool:
    """Whether a module's annotations say what its options may be: ours do, and those that use the marks."""
    marked = any(isinstance(n, ast.ImportFrom) and n.module == marks.__name__ for n in tree.body)
    return marked or module.partition(".")[0] == marks.__name__.partition(".")[0]


def hint_of(module: str, node: ast.expr | None) -> Any:
    """The type that an annotation in a module stands for, with its marks; Any where it cannot be read."""
    if node is None:
        return Any
    try:
        return _type(module, node, DEEPEST)
    except (Unreadable, TypeError, ValueError, ArithmeticError):
        return Any


def constant_of(module: str, node: ast.expr | None, otherwise: Any) -> Any:
    """The constant that an expression in a module is, as the default of an argument; `otherwise` where only
    an import can tell."""
    try:
        return otherwise if node is None else _value(module, node, DEEPEST)
    except (Unreadable, TypeError, ValueError, ArithmeticError):
        return otherwise


def _type(module: str, node: ast.expr, depth: int) -> Any:
    """As `_value`, for a place where a type stands: one that is not known is any."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _either(_type(module, node.left, depth), _type(module, node.right, depth))
    if isinstance(node, ast.Subscript):
        outer = _type(module, node.value, depth)
        if outer is Any:
            return Any
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer is Annotated:
            found = [_value(module, mark, depth) for mark in inner[1:]]
            return Annotated[(_type(module, inner[0], depth), *found)]
        if outer is not Literal:
            return _either(*(_type(module, i, depth) for i in inner)) if outer is Union else outer
        return outer[tuple(_value(module, i, depth) for i in inner)]
    try:
        return _value(module, node, depth)
    except Unreadable:
        return Any


def _either(*hints: Any) -> Any:
    return Union[hints]  # noqa: UP007  # Python 3.10 knows no `Any | None`


def _value(module: str, node: ast.expr, depth: int) -> Any:
    """What an expression of constants, and of names that stand for them, is."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return _named(module, node.id, depth)
        case ast.Tuple() | ast.List():
            return tuple(_items(module, node.elts, depth))
        case ast.Dict() if all(node.keys):
            keys = _items(module, [k for k in node.keys if k], depth)
            return dict(zip(keys, [None] * len(keys), strict=True))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(module, node.operand, depth)
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            return _computed(node.op, *(_value(module, side, depth) for side in (node.left, node.right)))
        case ast.Subscript() | ast.BinOp(op=ast.BitOr()):
            return _type(module, node, depth)
        case ast.Call():
            return _made(module, node, depth)
    raise Unreadable


def _computed(operation: ast.operator, left: Any, right: Any) -> Any:
    """Of numbers, and none that takes long."""
    numbers = is_number(left) and is_number(right)
    if not numbers or (isinstance(operation, ast.Pow) and abs(right) > LARGEST):
        raise Unreadable
    return ARITHMETIC[type(operation)](left, right)


def _items(module: str, nodes: list[ast.expr], depth: int) -> list[Any]:
    found: list[Any] = []
    for node in nodes:
        if isinstance(node, ast.Starred):
            found += _value(module, node.value, depth)
        else:
            found.append(_value(module, node, depth))
    return found


def _made(module: str, node: ast.Call, depth: int) -> Any:
    """A mark: what one of the functions of `marks` makes of constants."""
    function = _value(module, node.func, depth)
    if function not in marks.MARKS or any(keyword.arg is None for keyword in node.keywords):
        raise Unreadable
    options = {str(k.arg): _value(module, k.value, depth) for k in node.keywords}
    return function(*_items(module, node.args, depth), **options)


def _named(module: str, name: str, depth: int) -> Any:
    """What a name of a module stands for: a constant, an alias, a type or a mark."""
    tree = tree_of(module)
    if tree is None or not depth:
        raise Unreadable
    found = binding(tree, name)
    match found:
        case None if isinstance(builtin := getattr(builtins, name, None), type):
            return builtin
        case ast.ImportFrom():
            return _imported(module, found, name, depth)
        case ast.AnnAssign(value=ast.expr() as value):
            return _value(module, value, depth - 1)
        case ast.Assign(targets=[ast.Name()]):
            return _value(module, found.value, depth - 1)
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            names = [target.id if isinstance(target, ast.Name) else "" for target in targets]
            return _value(module, values[names.index(name)], depth - 1)
    raise Unreadable


def _imported(module: str, found: ast.ImportFrom, name: str, depth: int) -> Any:
    origin = absolute(module, found)
    original = next(alias.name for alias in found.names if (alias.asname or alias.name) == name)
    if origin == marks.__name__:
        mark = getattr(marks, original, None)
        if mark in marks.MARKS or isinstance(mark, marks.Check):
            return mark
        raise Unreadable
    if origin in STANDARD:
        return getattr(importlib.import_module(origin), original)
    if (origin, original) == ("math", "inf"):
        return math.inf
    return _named(origin, original, depth - 1)
