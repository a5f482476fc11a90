"""`lora-lightning shrink`: an adapter's updates by the best ones of lower rank, without its base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.errors import UserError
from lora_lightning.files.format import write_adapter
from lora_lightning.files.hubs.address import is_address
from lora_lightning.files.locate import AdapterSource, read_trained
from lora_lightning.files.random_base import carry_base
from lora_lightning.files.shrink import shrunk
from lora_lightning.methods.shortening import one_limit

LIMITS = ("rank", "energy", "budget")


def shrink(options: Mapping[str, Any]) -> str:
    """Write a smaller adapter.

    Args:
        options: of the command `shrink`, by name.

    Returns:
        What was kept and lost, as a table.

    Raises:
        UserError: every mistake in one message; the adapter cannot be read or is no plain LoRA.
        WriteError: the folder cannot be written.
    """
    limits = {name: options.get(name) for name in LIMITS}
    out = Path(options["out"]).expanduser()
    problems = [p for p in (one_limit(**limits), folder_problem(out, bool(options.get("overwrite")))) if p]
    if problems:
        raise UserError("\n".join(problems))
    source = read_trained(options["adapter"])
    if not isinstance(source, AdapterSource):
        raise UserError(
            f"adapter={options['adapter']}: holds all weights of a network, and no adapter. Give an adapter."
        )
    saved, told = shrunk(source.saved, **limits)
    write_adapter(out, dataclasses.replace(saved, origin=source.origin()))
    carry_base(source.base_folders(), out)
    return f"{told}\n{out}: {told.parameters:,} parameters of {len(saved.plan.layers)} updates"


def folder_problem(out: Path, overwrite: bool) -> str | None:
    """Why an adapter cannot be written into this folder, or None when it can."""
    if is_address(out):
        return f"out={out}: give a folder; `lora-lightning push adapter=FOLDER to={out}` uploads it."
    if out.is_file():
        return f"out={out}: is a file; give a folder."
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        return f"out={out} is not empty: give another folder, or overwrite=true."
    return None
