"""Small files of plain values, in JSON or YAML: a mapping is read from one, and nothing in it is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.errors import AdapterFileError

LARGEST = 16 * 2**20  # bytes; the description of a thousand adapted layers takes less than one MiB
PARSERS: dict[str, Callable[[str], Any]] = {".json": json.loads, ".yaml": yaml.safe_load}


def read_mapping(path: Path, remedy: str) -> dict[str, Any]:
    """What a file that ends in .json or .yaml holds; of an empty one nothing.

    Args:
        remedy: what to do when it cannot be read; ends each message.

    Raises:
        AdapterFileError: it cannot be read, is damaged, too large, or holds something else than a mapping.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
        values = PARSERS[path.suffix](text.decode("utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}. {remedy}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AdapterFileError(f"{path} cannot be read: {reason}. {remedy}") from None
    if values is not None and not isinstance(values, dict):
        raise AdapterFileError(f"{path} is damaged: it holds no mapping of names to values. {remedy}")
    return values or {}
