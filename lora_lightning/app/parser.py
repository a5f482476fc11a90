"""How the words of a command are read: `key=value`, flags and paths, and what is said of a wrong one."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lora_lightning.data.stream_sources import is_url
from lora_lightning.errors import did_you_mean
from lora_lightning.files.hubs.address import address_problem, is_address
from lora_lightning.utils.marks import (
    FLAG,
    TEXT,
    Check,
    at_least,
    whole,
)


class Page(argparse.HelpFormatter):
    """Options as they are typed: `out=FILE`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        text = super()._format_action_invocation(action)
        return text if action.nargs == 0 else re.sub(r"^--(\w+) ", r"\1=", text)


class Parser(argparse.ArgumentParser):
    """Reads `key=value` words as options, and tells all mistakes at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Page, allow_abbrev=False, exit_on_error=False, **options)
        self.keys: dict[str, str] = {}  # of options, and how each is written: `out=FILE`
        self.needed: list[str] = []
        self.flags: list[str] = []

    def flag(self, *names: str, **options: Any) -> None:
        """Declare a flag of Hydra's."""
        self.add_argument(*names, **options)
        self.flags += names

    def key(
        self,
        name: str,
        metavar: str,
        text: str,
        read: Callable[[str], Any] | None = None,
        needed: bool = False,
    ) -> None:
        """Declare `name=VALUE`.

        Args:
            metavar: stands for the value on the help page.
            read: the value of a text, or ArgumentTypeError; None takes any text.
            needed: it may not be left out.
        """
        kind = read or value_of(str, TEXT)
        self.add_argument(f"--{name}", metavar=metavar, help=text, type=kind, default=argparse.SUPPRESS)
        self.keys[name] = f"{name}={metavar}"
        self.needed += [name] if needed else []

    def read(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
        """Options and positional words; words that are neither; and what is wrong, one line each.

        Raises:
            SystemExit: 0 after the help page, where the command has one of argparse.
        """
        names = [word.removeprefix("--").partition("=")[0] for word in words]
        lacking = [self.keys[name] for name in self.needed if name not in names]
        problems = [f"give {' and '.join(lacking)}."] if lacking else []
        problems += [f"{n}: is given twice: give it once." for n in self.keys if names.count(n) > 1]
        tokens = [f"--{w}" if w.partition("=")[0] in self.keys and "=" in w else w for w in words]
        while True:
            try:
                given, strays = self.parse_known_intermixed_args(tokens)
                return given, strays, problems
            except argparse.ArgumentError as error:
                tokens = self._without(tokens, error, problems)

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)

    def _without(self, tokens: list[str], error: argparse.ArgumentError, problems: list[str]) -> list[str]:
        """The words but for the one that is wrong."""
        names = (error.argument_name or "").split("/")
        found = [i for i, token in enumerate(tokens) if token.partition("=")[0] in names]
        at = next((i for i in found if "=" in tokens[i]), found[0] if found else None)
        if at is None:
            problems.append(f"{error}.")
            return [token for token in tokens if not token.startswith("-")]
        end = at + 1
        if "=" not in tokens[at]:
            end += tokens[end : end + 1] != [] and not tokens[end].startswith("-")
        told = " ".join(tokens[at:end])
        end_of_line = "" if error.message.endswith((".", "?")) else "."
        problems.append(f"{told.removeprefix('--') if self.keys else told}: {error.message}{end_of_line}")
        return tokens[:at] + tokens[end:]

    def stray(self, word: str) -> str:
        """What is wrong with a word that is no option."""
        name = word.lstrip("-").partition("=")[0]
        if name in self.keys:
            return f"{word}: give {self.keys[name]}."
        known = [*self.keys, *self.flags]
        return f"{word}: there is no such option.{did_you_mean(name, known)} Options: {', '.join(known)}."


def value_of(kind: Callable[[str], Any], check: Check) -> Callable[[str], Any]:
    """Reads an option's text, as argparse's `type`, and refuses what its check does."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"give {check.allowed}.") from None
        if not check.allows(value):
            raise argparse.ArgumentTypeError(check.remedy(value))
        return value

    return read


def existing(text: str) -> str:
    """A file or folder that is there."""
    if problem := missing_path(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def existing_or_url(text: str) -> str:
    """A file or folder that is there, or an address as `s3://bucket/folder`, where nobody looks yet."""
    return text if is_url(text) else existing(text)


def found_or_address(text: str) -> str:
    """A file or folder that is there, or an address on a hub, where nobody looks yet."""
    if not is_address(text):
        return existing(text)
    if problem := address_problem(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def missing_path(path: str | os.PathLike[str]) -> str:
    """`there is no such file or folder`, with what lies near by; empty where there is one."""
    file = Path(path).expanduser()
    if file.exists():
        return ""
    return f"there is no such file or folder.{did_you_mean(str(file), _near(file))} Give one that there is."


def _near(file: Path) -> list[str]:
    """Where a path that is not there leads, if its first part that is absent is spelt like what is there."""
    parents = [file, *file.parents]
    lost = next(i for i, one in enumerate(parents) if i + 1 == len(parents) or parents[i + 1].is_dir())
    folder, rest = parents[lost].parent, file.relative_to(parents[lost])
    with contextlib.suppress(OSError):
        found = [one / rest for one in folder.iterdir() if did_you_mean(parents[lost].name, [one.name])]
        return [str(one) for one in found if one.exists()]
    return []


switch = value_of(lambda text: {"true": True, "false": False}.get(text, text), FLAG)
some = value_of(int, whole(at_least(1)))
