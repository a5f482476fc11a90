"""The texts of this package's own errors, read from its source: each with the place that raises it.

What is put together at run time stands as `<name>`, or `…` where the source has no name for it.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lora_lightning"
ERRORS = (
    "UserError",
    "ConfigError",
    "AdapterFileError",
    "MissingFileError",
    "WriteError",
    "DataError",
    "AudioError",
    "LibraryError",
)
MOST = 6  # texts of one expression: beyond, the parts that vary are left open
DEPTH = 6  # calls that are followed from where an error is raised
GAP = "…"
GATHERED = ("problems", "errors", "found", "faults", "failed", "told")
SAYS_SO = re.compile(r"problem|fault|wrong|unknown|refus|apart|impossible|stray|details|reason")
Scope = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Message:
    """One text of an error, the file in which it stands, and whether it is raised as it stands."""

    module: str  # such as `files.locate`
    text: str
    whole: bool = False


class Source:
    """A module of the package: its functions, its constants, and what it imports from the others."""

    def __init__(self, name: str, text: str) -> None:
        tree = ast.parse(text)
        self.name = name
        self.topic = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
        self.functions: dict[str, Scope] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        self.constants = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        self.nodes: list[tuple[Scope | None, ast.AST]] = []  # that say something, in their function
        self._read(tree, None)

    def _read(self, node: ast.AST, scope: Scope | None) -> None:
        if isinstance(node, Scope):
            self.functions[node.name] = scope = node
        elif isinstance(node, (ast.Raise, ast.Call, ast.AugAssign)):
            self.nodes.append((scope, node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_lightning"):
            module = (node.module or "").removeprefix("lora_lightning").lstrip(".")
            self.imports |= {a.asname or a.name: (module, a.name) for a in node.names}
        for child in ast.iter_child_nodes(node):
            self._read(child, scope)


class Reader:
    """Follows expressions to the texts that they may be."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = {source.name: source for source in sources}

    @classmethod
    def of_package(cls) -> Reader:
        paths = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"]
        names = [".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in paths]
        return cls(Source(name, p.read_text(encoding="utf-8")) for name, p in zip(names, paths))

    def raised(self) -> Iterator[tuple[Source, ast.Raise, list[Message]]]:
        """Every place that raises an error of ours, with its texts, and those of a check's findings."""
        for source in self.sources.values():
            for scope, node in source.nodes:
                call = node.exc if isinstance(node, ast.Raise) else None
                if isinstance(node, ast.Raise) and isinstance(call, ast.Call) and _name(call.func) in ERRORS:
                    found = [m for a in call.args for m in self.lines(source, scope, a, 0)]
                    whole = {t for a in call.args for t in self.texts(source, scope, a)}
                    yield source, node, [replace(m, whole=m.text in whole) for m in found]

    def findings(self) -> Iterator[Message]:
        """What the checks of data sets find: `found.add(what, where, remedy)`."""
        for source in self.sources.values():
            for scope, node in source.nodes:
                if isinstance(node, ast.Call) and _name(node.func) == "add" and len(node.args) >= 3:
                    for what in self.whole(source, scope, node.args[0]):
                        for remedy in self.whole(source, scope, node.args[2]):
                            yield Message(source.name, f"{what} | {remedy}")

    def gathered(self) -> Iterator[Message]:
        """Lines of errors that are gathered in one place and raised in another: what is added to a list of
        problems, what functions return whose names say so, and the options that do not go together."""
        for source in self.sources.values():
            for scope, node in source.nodes:
                if isinstance(node, ast.Call) and _name(node.func) == "require":
                    parts: list[ast.expr] = node.args[2:]
                elif isinstance(node, ast.Call):
                    parts = node.args if _adds(node) in GATHERED else []
                elif isinstance(node, ast.AugAssign) and _name(node.target) in GATHERED:
                    parts = [node.value]
                else:
                    parts = []
                for part in parts:
                    yield from self.lines(source, scope, part, 0)
            for name, function in source.functions.items():
                if SAYS_SO.search(name):
                    yield from self.returned(source, function, 0)

    def lines(self, source: Source, scope: Scope | None, node: ast.AST, depth: int) -> Iterator[Message]:
        """The texts that stand by themselves within an expression: it, or each line that it gathers."""
        if depth > DEPTH or (isinstance(node, ast.Constant) and not isinstance(node.value, str)):
            return
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
            texts = self.whole(source, scope, node)
            for text in texts:
                yield Message(source.name, text)
            for part in ast.walk(node):  # lines that are joined within it, or told by another function
                if isinstance(part, ast.Call) and (_name(part.func) == "join" or not tidy("".join(texts))):
                    yield from self.called(source, scope, part, depth + 1)
            if isinstance(node, ast.BinOp):
                for side in (node.left, node.right):
                    if isinstance(side, (ast.List, ast.ListComp, ast.Call, ast.Name)):
                        yield from self.lines(source, scope, side, depth + 1)
        elif isinstance(node, (ast.List, ast.Tuple)):
            for one in node.elts:
                yield from self.lines(source, scope, one, depth)
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            yield from self.lines(source, scope, node.elt, depth)
            if isinstance(node.elt, (ast.Name, ast.JoinedStr)):
                for generator in node.generators:
                    yield from self.lines(source, scope, generator.iter, depth + 1)
        elif isinstance(node, (ast.Starred, ast.YieldFrom, ast.NamedExpr)):
            yield from self.lines(source, scope, node.value, depth)
        elif isinstance(node, ast.IfExp):
            yield from self.lines(source, scope, node.body, depth)
            yield from self.lines(source, scope, node.orelse, depth)
        elif isinstance(node, (ast.BoolOp, ast.Dict)):
            for one in node.values:
                yield from self.lines(source, scope, one, depth)
        elif isinstance(node, ast.Name):
            for value in _given(scope, node.id):
                yield from self.lines(source, scope, value, depth + 1)
        elif isinstance(node, ast.Call):
            yield from self.called(source, scope, node, depth)

    def called(self, source: Source, scope: Scope | None, call: ast.Call, depth: int) -> Iterator[Message]:
        name = _name(call.func)
        if name in ("join", "str", "list", "sorted", "filter", "tuple", "chain", "fromkeys", "map"):
            for one in call.args:
                yield from self.lines(source, scope, one, depth + 1)
            return
        tuples = [v for given in _given(scope, name) for v in (_given(scope, _name(given)) or [given])]
        each = [_name(e) for t in tuples if isinstance(t, ast.Tuple) for e in t.elts]  # for f in (one, other)
        for function in each or [name]:
            if found := self.function(source, function):
                yield from self.returned(*found, depth + 1)

    def function(self, source: Source, name: str) -> tuple[Source, Scope] | None:
        if name in source.functions:
            return source, source.functions[name]
        module, theirs = source.imports.get(name, ("", ""))
        there = self.sources.get(module)
        if there and theirs in there.functions:
            return there, there.functions[theirs]
        owners = [other for other in self.sources.values() if name in other.functions]  # of a method
        return (owners[0], owners[0].functions[name]) if len(owners) == 1 else None

    def returned(self, source: Source, scope: Scope, depth: int) -> Iterator[Message]:
        for node in _within(scope):
            value = node.value if isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)) else None
            if value is not None and _name(value) not in _parameters(scope):
                yield from self.lines(source, scope, value, depth)

    def whole(self, source: Source, scope: Scope | None, node: ast.AST, depth: int = 0) -> list[str]:
        """The texts that an expression may be, as a whole."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else [str(node.value)]
        if depth > 3:
            return [_open(node)]
        if isinstance(node, ast.JoinedStr):
            return self.joined(source, scope, node.values, depth)
        if isinstance(node, ast.FormattedValue):
            plain = node.format_spec is None
            return self.whole(source, scope, node.value, depth) if plain else [_open(node.value)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.joined(source, scope, [node.left, node.right], depth)
        if isinstance(node, ast.IfExp):
            both = self.whole(source, scope, node.body, depth) + self.whole(source, scope, node.orelse, depth)
            return [text for text in dict.fromkeys(both) if text] or [""]
        if isinstance(node, ast.Name):
            return self.named(source, scope, node, depth)
        if isinstance(node, ast.Call) and "remedy" in _name(node.func):
            return self.remedies(source, node, depth)
        if isinstance(node, ast.Attribute) and _name(node.value) in source.imports:
            there = self.sources.get(".".join(source.imports[_name(node.value)]))
            if there and node.attr in there.constants:
                return self.whole(there, None, there.constants[node.attr], depth + 1)
        return [_open(node)]

    def remedies(self, source: Source, call: ast.Call, depth: int) -> list[str]:
        """What a function of the package may return that is called a remedy."""
        found = self.function(source, _name(call.func))
        if not found:
            return [_open(call)]
        there, function = found
        values = [n.value for n in _within(function) if isinstance(n, ast.Return) and n.value is not None]
        return [text for value in values for text in self.whole(there, function, value, depth + 1)]

    def passed(self, source: Source, scope: Scope, name: str, depth: int) -> list[str]:
        """The texts that callers within the package give for a parameter, and its default."""
        arguments = [*scope.args.posonlyargs, *scope.args.args]
        place = next((i for i, a in enumerate(arguments) if a.arg == name), -1)
        missing = place - len(arguments) + len(scope.args.defaults)
        found: dict[str, None] = {}
        for other in self.sources.values():
            for caller, node in other.nodes:
                if not isinstance(node, ast.Call) or _name(node.func) != scope.name or depth > 3:
                    continue
                if self.function(other, scope.name) != (source, scope):
                    continue
                named = [k.value for k in node.keywords if k.arg == name]
                given = [*named, *node.args[place : place + 1 if place >= 0 else 0]][:1]
                if not given and 0 <= missing < len(scope.args.defaults):
                    found |= dict.fromkeys(self.whole(source, None, scope.args.defaults[missing], depth + 1))
                for one in given:
                    found |= dict.fromkeys(self.whole(other, caller, one, depth + 1))
        texts = (" ".join(text.split()) for text in found)
        return [text for text in texts if re.search(r"\w{3}", text.replace("<remedy>", ""))]

    def joined(self, source: Source, scope: Scope | None, parts: list[ast.expr], depth: int) -> list[str]:
        options = [self.whole(source, scope, part, depth) for part in parts]
        count = 1
        for i, texts in enumerate(options):
            if count * len(texts) > MOST:
                options[i] = [_open(parts[i])]
            count *= len(options[i])
        return ["".join(texts) for texts in product(*options)]

    def texts(self, source: Source, scope: Scope | None, node: ast.AST) -> list[str]:
        """What is raised as it stands: the text itself, or those of a list that is written out."""
        if isinstance(node, (ast.List, ast.ListComp)):
            parts = node.elts if isinstance(node, ast.List) else [node.elt]
            return [t for part in parts for t in self.texts(source, scope, part)]
        given = _given(scope, node.id) if isinstance(node, ast.Name) else [node]
        textual = (ast.Constant, ast.JoinedStr, ast.IfExp, ast.BinOp)
        return [t for one in given if isinstance(one, textual) for t in self.whole(source, scope, one)]

    def named(self, source: Source, scope: Scope | None, node: ast.Name, depth: int) -> list[str]:
        """What a constant or a local name stands for, where it is always a text."""
        values = _given(scope, node.id)
        where: Source | None = source
        if scope and not values and node.id == "remedy" and node.id in _parameters(scope):
            passed = self.passed(source, scope, node.id, depth)
            return [" Or: ".join(passed) if 0 < len(passed) <= 3 else _open(node)]
        if not values and node.id in source.constants:
            values = [source.constants[node.id]]
        elif not values and node.id in source.imports:
            module, theirs = source.imports[node.id]
            where = self.sources.get(module)
            values = [where.constants[theirs]] if where and theirs in where.constants else []
        textual = (ast.Constant, ast.JoinedStr, ast.IfExp, ast.BinOp)
        told = all(isinstance(v, textual) or "remedy" in _name(getattr(v, "func", v)) for v in values)
        if not values or len(values) > 3 or not where or not told:
            return [_open(node)]
        texts = [t for value in values for t in self.whole(where, scope, value, depth + 1)]
        return [text for text in dict.fromkeys(texts) if text] or [""]


@functools.cache
def _within(scope: Scope) -> list[ast.AST]:
    """The nodes of a function, without those of functions in it."""
    found: list[ast.AST] = list(scope.body)
    for node in found:  # which grows
        if not isinstance(node, Scope):
            found += ast.iter_child_nodes(node)
    return found


@functools.cache
def _given(scope: Scope | None, name: str) -> list[ast.expr]:
    """What a local name is given within its function, by assignment, by `append` or by a loop."""
    found: list[ast.expr] = []
    for node in _within(scope) if scope else ():
        if isinstance(node, ast.Assign) and any(_name(t) == name for t in node.targets):
            found.append(node.value)
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and _name(node.target) == name:
            found += [node.value] if node.value is not None else []
        elif isinstance(node, (ast.For, ast.comprehension)) and _name(node.target) == name:
            found.append(node.iter)
        elif isinstance(node, ast.Call) and _adds(node) == name:
            found += node.args
    return found


def _adds(call: ast.Call) -> str:
    """The name of the list to which a call adds; "" of others."""
    adds = isinstance(call.func, ast.Attribute) and call.func.attr in ("append", "extend")
    return _name(call.func.value) if adds and isinstance(call.func, ast.Attribute) else ""


def _parameters(scope: Scope) -> set[str]:
    return {a.arg for a in (*scope.args.args, *scope.args.kwonlyargs)}


def _name(node: ast.AST) -> str:
    """The last name of a dotted one; "" of other expressions."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _open(node: ast.AST) -> str:
    """What stands for a part that is known at run time alone."""
    if isinstance(node, ast.Call):
        name = _name(node.func)
        if name == "did_you_mean":
            return " Did you mean …?"
        if name in ("repr", "show", "str", "truncate_list", "len", "type") and node.args:
            return _open(node.args[0])
        return GAP
    if isinstance(node, ast.Attribute) and _name(node.value) == "self":
        return f"<{node.attr}>"
    name = _name(node)
    return f"<{name}>" if name and not name.startswith("_") else GAP


def tidy(text: str) -> str:
    """One line, with single gaps; "" of a text with hardly a fixed word in it."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"(?:…\s*){2,}", "… ", text)
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"<\w+>|…|Did you mean|Options:|to get it:", " ", text))
    return text if len(words) >= 3 else ""
