"""What one pattern of the configuration means: a name, a glob or a regular expression."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

# What neither a module's name nor a glob has; a glob does not begin with a dot either.
REGEX = re.compile(r"[\^$\\()|+{}]|^\.[*+?]")


def is_regex(pattern: str) -> bool:
    """Whether a pattern is a regular expression: it has one of `^ $ \\ ( ) | + { }`, or begins with `.*`."""
    return REGEX.search(pattern) is not None


def is_name(pattern: str) -> bool:
    """Whether a pattern is a plain name: neither a regular expression nor a glob (`*`, `?`, `[`)."""
    return not is_regex(pattern) and not any(c in pattern for c in "*?[")


def means(pattern: str, name: str) -> bool:
    """Whether a pattern means a dotted name, as a whole or as the ending that begins after a dot: `qkv` and
    `attn.qkv` mean `blocks.0.attn.qkv`, `kv` does not. In a name a dot is a dot."""
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    if is_name(pattern):
        return False
    if is_regex(pattern):
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def spells(pattern: str) -> bool:
    r"""Whether a pattern spells one name: a plain one, or as a regular expression `^layer\.1$`."""
    return is_name(re.sub(r"\\(\W)|[\^$]", lambda m: m[1] or "", pattern))


def specificity(pattern: str) -> tuple[bool, int, bool]:
    """Larger for the more specific of two patterns: one that spells a name before one that does not, then
    that with more letters and digits, then that which begins where the name does."""
    letters = re.sub(r"\\\w|\W", "", pattern)
    return spells(pattern), len(letters), pattern.startswith("^")


def problem(pattern: str) -> str | None:
    """Why a pattern cannot be read, or None when it can."""
    if not is_regex(pattern):
        return None
    try:
        re.compile(rf"(?:.*\.)?(?:{pattern})")
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression: {error}. Escape with \\ what is meant as it stands"
    return None


def exactly(name: str) -> str:
    """The pattern that means this whole name and no other."""
    return f"^{re.escape(name)}$"


def alone(name: str, known: Iterable[str]) -> str:
    """The name itself where it is the ending of no other known one, else `exactly` it."""
    return exactly(name) if any(k != name and means(name, k) for k in known) or not is_name(name) else name
