"""Small files of plain values, in JSON or YAML, whoever wrote them: they are read, and nothing is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.errors import AdapterFileError

LARGEST = 16 * 2**20  # bytes; the description of a thousand adapted layers takes less than one MiB
NOTHING_RUN = "Nothing in it was run; it holds plain values alone."  # a remedy, of a file of anyone's
PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}


def read_text(path: Path, remedy: str, largest: int = LARGEST) -> str:
    """The text of a file.

    Args:
        remedy: what to do when it cannot be read; ends each message.
        largest: bytes that it may have.

    Raises:
        AdapterFileError: it cannot be read, or is too large.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(largest + 1)
        if len(text) > largest:
            raise ValueError(f"it is larger than {largest >> 20} MiB")
        return text.decode("utf-8")
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}. {remedy}") from None
    except ValueError as error:
        raise _unreadable(path, error, remedy) from None


def parse_values(text: str, path: Path, remedy: str) -> Any:
    """What a text holds that was read from a file that ends in .json, .yaml or .yml.

    Raises:
        AdapterFileError: it is damaged, or holds more than plain values.
    """
    try:
        return PARSERS[path.suffix](text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise _unreadable(path, error, remedy) from None


def read_values(path: Path, remedy: str, largest: int = LARGEST) -> Any:
    """What a file holds, of at most so many bytes.

    Raises:
        AdapterFileError: as `read_text` and `parse_values`.
    """
    return parse_values(read_text(path, remedy, largest), path, remedy)


def read_mapping(path: Path, remedy: str) -> dict[str, Any]:
    """The mapping that a file holds; of an empty one nothing.

    Raises:
        AdapterFileError: as `read_values`; or it holds something else than a mapping.
    """
    values = read_values(path, remedy)
    if values is not None and not isinstance(values, dict):
        raise AdapterFileError(f"{path} is damaged: it holds no mapping of names to values. {remedy}")
    return values or {}


def _unreadable(path: Path, error: Exception, remedy: str) -> AdapterFileError:
    reason = " ".join(str(error).split())[:200]
    return AdapterFileError(f"{path} cannot be read: {reason}. {remedy}")
