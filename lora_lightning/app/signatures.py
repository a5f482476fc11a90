"""What the callables named in a configuration take: arguments that are wrong or missing, and values."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from lora_lightning.app.foreign import KNOWN
from lora_lightning.app.options import PROVIDED
from lora_lightning.app.static_signatures import missing_name, static_checks, static_signature
from lora_lightning.app.user_modules import import_remedy
from lora_lightning.errors import did_you_mean
from lora_lightning.utils import checks
from lora_lightning.utils.libraries import LibraryError
from lora_lightning.utils.marks import show
from lora_lightning.utils.tables import truncate_list

RESERVED = ("_target_", "_args_", "_recursive_", "_convert_", "_partial_")


_IMPORTING: ContextVar[bool] = ContextVar("_IMPORTING", default=True)


@contextlib.contextmanager
def without_imports() -> Iterator[None]:
    """Within this context no module of the user's or of anyone else's is imported to see what it takes: what
    its source does not tell stays unknown."""
    token = _IMPORTING.set(False)
    try:
        yield
    finally:
        _IMPORTING.reset(token)


def _signature(target: str) -> tuple[inspect.Signature | None, str]:
    """From the source where that is enough, so that mistakes are told before anything heavy is imported."""
    if found := static_signature(target):
        return found, ""
    if not _IMPORTING.get() and target not in KNOWN:
        return inspect.signature(lambda **_: None), ""
    reason = missing_name(target) or import_problem(target)
    return (None, reason) if reason else (_imported_signature(target), "")


@functools.lru_cache(maxsize=256)
def _imported_signature(target: str) -> inspect.Signature:
    from hydra.utils import get_object

    try:
        return inspect.signature(get_object(target))
    except ValueError:  # classes written in C have none
        return inspect.signature(lambda **_: None)


def import_problem(target: str) -> str | None:
    """Why a callable cannot be imported, if it cannot: its whole module is loaded.

    Raises:
        LibraryError: a library that it needs does not load.
    """
    from hydra.utils import get_object

    logger = logging.getLogger("hydra.utils")  # which logs what it cannot import, and raises it as well
    before, logger.disabled = logger.disabled, True
    try:
        get_object(target)
    except Exception as error:  # an import runs any code
        if isinstance(error.__cause__, LibraryError):
            raise error.__cause__ from None
        return " ".join(str(error).split())[:200] or type(error).__name__
    finally:
        logger.disabled = before
    return None


def value_problems(path: str, node: Mapping[str, Any], of: Any, references: Collection[str]) -> list[str]:
    """One line for each value of this node that its declaration does not allow.

    Args:
        of: what declares the options, or their checks.
        references: dotted names whose values are those of others, which are checked there.
    """
    own = {
        name: value
        for name, value in node.items()
        if f"{path}.{name}" not in references
        and name not in PROVIDED.get(path, {})
        and not (
            isinstance(value, dict) and "_target_" in value
        )  # what it builds is checked when it is built
    }
    return checks.problems(of, own, f"{path}.")


def argument_problems(path: str, node: Mapping[str, Any], references: Collection[str] = ()) -> list[str]:
    """One line for each argument of this node that is wrong, missing, or not the user's to give.

    Args:
        references: dotted names whose values are those of others, which are checked there.
    """
    target = node["_target_"]
    if not isinstance(target, str) or not target:
        return [f"{path}._target_={show(target)}: give the dotted name of a class or function."]
    signature, reason = _signature(target)
    if signature is None:
        remedy = import_remedy(target)
        return [f"{path}._target_={target}: cannot be imported: {reason}{remedy}"]
    parameters = dict(signature.parameters)
    kinds = {p.kind for p in parameters.values()}
    known = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    provided = PROVIDED.get(path, {})
    problems = [
        f"{path}.{key}: is set by the application: leave it out; {provided[key]}."
        for key in node
        if key in provided
    ]
    name = target.rpartition(".")[2]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        problems += [
            f"{path}.{key}={show(node[key])}: {name} takes no such option.{did_you_mean(key, known)} "
            f"Options: {truncate_list(known, most=12) or 'none'}."
            for key in node
            if key not in known and key not in RESERVED
        ]
    # A page of help may leave open, as null, what a run must be given.
    given = node if _IMPORTING.get() else {key: value for key, value in node.items() if value is not None}
    problems += value_problems(path, given, static_checks(target), references)
    problems += [
        f"{path}.{key}: {name} needs it; give {path}.{key}=VALUE."
        for key in known
        if parameters[key].default is inspect.Parameter.empty
        and key not in node
        and key not in provided
        and "_args_" not in node
        and not node.get("_partial_")
    ]
    return problems


def declared_problems(path: str, node: Mapping[str, Any], references: Collection[str] = ()) -> list[str]:
    """One line for each value of this node that its class, imported by now, does not allow: some checks, such
    as those that ask timm, cannot be read from the source."""
    from hydra.utils import get_object

    found = get_object(node["_target_"])
    return value_problems(path, node, found, references) if checks.declares(found) else []


def takes(target: str, argument: str | None) -> bool:
    """Whether a callable names this argument; with None, whether it takes any at all."""
    signature, _ = _signature(target)
    if signature is None:
        return False
    kinds = [p.kind for p in signature.parameters.values()]
    if argument is None:
        return inspect.Parameter.VAR_KEYWORD in kinds
    return argument in signature.parameters


def provided(data: Any, node: Mapping[str, Any]) -> dict[str, Any]:
    """What the data say of themselves (`provides`) and the class of this node asks for."""
    facts = getattr(data, "provides", {})
    return {name: value for name, value in facts.items() if takes(node["_target_"], name)}


def lacking(node: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What the class of this node needs beyond its options and these facts."""
    signature, _ = _signature(node["_target_"])
    parameters = signature.parameters.items() if signature else ()
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in parameters
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in variable
        and name not in node
        and name not in facts
    ]
