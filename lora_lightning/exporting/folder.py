"""The folder of an exported model: made beside its place, which it takes whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.errors import UserError
from lora_lightning.utils.atomic import make_folder, reported

FACTS = "export.json"  # what lies in a folder, and what it says of itself


def folder_problem(out: Path, overwrite: bool) -> str | None:
    """Why an exported model cannot be written into this folder, or None when it can."""
    if out.is_file():
        return f"out={out}: is a file; give a folder."
    if not out.is_dir() or not any(out.iterdir()):
        return None
    if not overwrite:
        return f"out={out} is not empty: give another folder, or overwrite=true."
    known = {FACTS, *_files_of(out)}
    if strange := sorted(path.name for path in out.iterdir() if path.name not in known):
        return f"out={out}: holds {strange[0]}, which is of no exported model: give another folder."
    return None


@contextlib.contextmanager
def written(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` when all has gone well, and is gone otherwise.

    Args:
        overwrite: an earlier exported model that lies there is replaced.

    Raises:
        UserError: there is something else in it.
        WriteError: the disk is full, or the folder cannot be written.
    """
    if problem := folder_problem(out, overwrite):
        raise UserError(problem)
    out = out.absolute()
    make_folder(out.parent)
    with reported(out):
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with reported(out):
            (place / "new").mkdir()  # with the rights that the umask allows
            yield place / "new"
            if out.is_dir():
                os.rename(out, place / "old")
            try:
                os.rename(place / "new", out)
            except OSError:
                if (place / "old").is_dir():
                    os.rename(place / "old", out)
                raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _files_of(out: Path) -> list[str]:
    """What an earlier export says that it has written."""
    try:
        files = json.loads((out / FACTS).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
