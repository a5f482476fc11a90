"""Files written whole or not at all: what stood there before stays until the new file is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from lora_lightning.errors import FULL, WriteError
from lora_lightning.utils.writers import put_in_place, workplace


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never a part.

    Args:
        write: is called with the name of a temporary file to fill.

    Raises:
        WriteError: the disk is full or the folder cannot be written; no rest is left behind.
    """
    write_together({path: write})


def make_folder(folder: Path) -> None:
    """The folder and those above it.

    Raises:
        WriteError: it cannot be made, or a file stands there.
    """
    with reported(folder):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file stands in the place of the folder")
        folder.mkdir(parents=True, exist_ok=True)


def write_together(files: Mapping[Path, Callable[[str], object]]) -> None:
    """`write_whole` for several files of one folder: all are complete on the disk before the first takes
    its place. Of two writers at the same time one comes after the other, with all of its files; what a killed
    one has left in the folder is settled (`writers`).

    Args:
        files: path -> function that fills the temporary file whose name it is given.

    Raises:
        WriteError: as `write_whole`; no file has changed.
    """
    path = next(iter(files))
    folder = path.parent
    with reported(folder if len(files) > 1 else path), workplace(folder) as place:
        for number, (path, write) in enumerate(files.items()):
            temporary = place / f"{number}.{path.name}"
            with reported(path):
                write(str(temporary))
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.chmod(temporary, place.stat().st_mode & 0o666)  # as the umask allows
                if path.is_dir() and not path.is_symlink():
                    raise IsADirectoryError(errno.EISDIR, "a folder stands in the place of the file")
        put_in_place(place, [p.name for p in files])
        _sync_folder(folder)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """One error of ours for all that the system can refuse."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else _code_in(str(error))
        if code is None:
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or os.strerror(code)
        remedy = "Make room, or give another place. " if code in FULL else ""
        raise WriteError(
            code, f"{path} cannot be written: {reason}. {remedy}What stood there is as it was."
        ) from None


def _code_in(text: str) -> int | None:
    """The system's error in a message of safetensors."""
    found = re.search(r"\(os error (\d+)\)", text)
    return int(found[1]) if found else None


def _sync_folder(folder: Path) -> None:
    """Make renames last through a power failure, where the system can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
