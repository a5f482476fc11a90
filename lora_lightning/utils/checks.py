"""The check of options against their declaration: the annotations of the function or class that has them.

    def __init__(self, size: Annotated[int, between(1, 900)] = 300, shuffle: bool = True) -> None:
        require(DigitsDataModule, locals())

Python, Hydra and the command line all ask here. What can be declared: `lora_lightning.utils.marks`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, asdict, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

from lora_lightning.errors import ConfigError, did_you_mean
from lora_lightning.utils import marks
from lora_lightning.utils.marks import Check, Show, check_of, show

Function = TypeVar("Function", bound=Callable[..., Any])
MANY = 40  # options, which a line does not list


@functools.cache
def checks_of(of: Callable[..., Any]) -> dict[str, Check]:
    """The checks of a function's, a class's or a dataclass's options, in the order of their declaration."""
    if is_dataclass(of):
        hints = {
            name: _hint(annotation, vars(sys.modules[cls.__module__]))
            for cls in reversed(of.__mro__)
            for name, annotation in inspect.get_annotations(cls).items()
            if name in of.__dataclass_fields__
        }
    else:
        made = (
            next(vars(c)["__init__"] for c in of.__mro__ if "__init__" in vars(c))
            if isinstance(of, type)
            else of
        )
        function = inspect.unwrap(made)
        if not inspect.isfunction(function):  # the `__init__` of `object`
            return {}
        hints = {
            name: _hint(parameter.annotation, function.__globals__)
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
    found = {name: check_of(hint) for name, hint in hints.items()}
    return {name: check for name, check in found.items() if check}


def options_of(kind: type) -> Callable[[Function], Function]:
    """A decorator: the `**options` of a function are those of a class, which declares them."""

    def name_them(function: Function) -> Function:
        names = inspect.unwrap(vars(kind)["__init__"]).__globals__  # where its annotations mean something
        of = inspect.signature(kind)
        meant = [p.replace(annotation=_hint(p.annotation, names)) for p in of.parameters.values()]
        signature = with_options(inspect.signature(function), of.replace(parameters=meant))
        function.__signature__ = signature  # type: ignore[attr-defined]  # where `inspect` looks first
        return function

    return name_them


def with_options(own: inspect.Signature, of: inspect.Signature) -> inspect.Signature:
    """A function's signature with the options of another callable in place of its `**options`."""
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [p.replace(kind=p.KEYWORD_ONLY) for n, p in of.parameters.items() if n not in own.parameters]
    return own.replace(parameters=[*kept, *more])


def declares(of: Callable[..., Any]) -> bool:
    """Whether annotations say what the options of `of` may be: this package's do, and those of modules that
    use the marks. Elsewhere they may be wrong without harm."""
    module = sys.modules.get(getattr(of, "__module__", None) or "")
    ours = module is not None and module.__name__.partition(".")[0] == __name__.partition(".")[0]
    return ours or any(
        getattr(value, "__module__", "") == marks.__name__ for value in vars(module or of).values()
    )


def _hint(annotation: Any, names: Mapping[str, Any]) -> Any:
    try:
        return eval(annotation, dict(names)) if isinstance(annotation, str) else annotation
    except NameError:  # imported for type checkers alone
        return Any


def problems(
    of: Callable[..., Any] | Mapping[str, Check], options: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """One line for each of these options that its declaration does not allow.

    Args:
        of: the function, class or dataclass that has the options; or their checks by name.
        options: their values; other names in it, and options that are not, are left alone.
        prefix: what the names begin with where they are written, such as `data.` on a command line; values
            are then shown as they are written there.
    """
    checks = of if isinstance(of, Mapping) else checks_of(of)
    return [
        problem
        for name, check in checks.items()
        if name in options
        for problem in check.problems(f"{prefix}{name}", options[name], show if prefix else repr)
    ]


def require(of: Callable[..., Any], options: Mapping[str, Any], more: Iterable[str | None] = ()) -> None:
    """Nothing if the options are as declared and there are no problems besides.

    Args:
        options: `locals()` at the beginning of `of`.
        more: what else is wrong: options that do not go together.

    Raises:
        ConfigError: one line for each problem.
    """
    if found := [*problems(of, options), *(p for p in more if p)]:
        raise ConfigError(found)


def strays(given: Mapping[str, Any], known: Iterable[str], owner: str, prefix: str = "") -> list[str]:
    """One line for each of these options that is none of `owner`'s."""
    known = list(known)
    written = show if prefix else repr
    options = f" Options: {', '.join(known)}." if len(known) <= MANY else ""
    return [
        f"{prefix}{name}={written(value)} is not an option of {owner}.{did_you_mean(name, known)}{options}"
        for name, value in given.items()
        if name not in known
    ]


class Options:
    """Base of a dataclass whose fields are options: it checks itself, and others before they make one.

    Attributes:
        owner: whose options they are, in messages.
    """

    owner: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # which the decorator makes

    def __post_init__(self) -> None:
        for one in fields(self):
            setattr(self, one.name, self.plain(one.name, getattr(self, one.name)))
        if found := problems(type(self), vars(self)) or [*self.apart(vars(self), "")]:
            raise ConfigError(found)

    @classmethod
    def plain(cls, name: str, value: Any) -> Any:
        """A value as it is kept: of plain types, which every checkpoint can hold."""
        return value

    @classmethod
    def apart(cls, options: Mapping[str, Any], prefix: str) -> Iterable[str]:
        """One line for each fault of options taken together, each of which is sound.

        Args:
            options: all of them.
            prefix: as in `problems`.
        """
        return ()

    @classmethod
    def stray(cls, name: str, value: Any, prefix: str, known: Sequence[str]) -> str:
        """The line for a name that is none of these options."""
        return strays({name: value}, known, cls.owner, prefix)[0]

    @classmethod
    def problems(cls, options: Mapping[str, Any], prefix: str = "", beside: Iterable[str] = ()) -> list[str]:
        """Every problem of these options, unknown names included; an empty list when all is well.

        Args:
            prefix: what the names begin with where they are written, such as `lora.` on a command line.
            beside: other names that may be written there.
        """
        own = [one.name for one in fields(cls)]
        known = [*beside, *own]
        found = [cls.stray(name, v, prefix, known) for name, v in options.items() if name not in own]
        plain = {name: cls.plain(name, value) for name, value in options.items() if name in own}
        found += problems(cls, plain, prefix)
        return found or [*cls.apart({one.name: one.default for one in fields(cls)} | plain, prefix)]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, fit for JSON and for `weights_only` loading."""
        return asdict(self)


def fields_of(kind: type[Options]) -> Check:
    """A mark: the options of a dataclass as a mapping, or the dataclass, which has checked them."""

    def details(name: str, value: Any, show: Show) -> list[str]:
        return kind.problems(value, f"{name}.") if isinstance(value, Mapping) else []

    names = ", ".join(one.name for one in fields(kind))
    return Check(f"a mapping of {names}", lambda v: isinstance(v, (kind, Mapping)), details=details)
