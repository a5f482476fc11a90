"""The errors that a user can cause, and how a near miss is named. Nothing else raises to the user."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, or what one user or one file may take of it


class UserError(Exception):
    """A mistake that the user can mend: the command line prints the message alone, no traceback."""


class ConfigError(UserError, ValueError):
    """Every problem of one configuration, together.

    Args:
        problems: one line a problem: the option, the value given, what is allowed, the remedy.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)


class AdapterFileError(UserError, ValueError):
    """An adapter file or checkpoint that is missing, damaged, foreign or made for another model."""


class MissingFileError(UserError, FileNotFoundError):
    """Weights or data that are not on this machine; the message says where they go and how to get them."""

    def __str__(self) -> str:
        return str(self.args[0])


class WriteError(UserError, OSError):
    """A file that cannot be written: the disk is full, the folder is locked. `errno` is the system's."""

    def __str__(self) -> str:
        return str(self.args[1])


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first; possibly none."""
    return difflib.get_close_matches(str(name), [str(k) for k in known], n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'qkv'?` with a leading space, or an empty string when nothing is near."""
    near = nearest(name, known)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
