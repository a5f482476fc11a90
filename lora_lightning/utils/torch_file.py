"""Files that `torch.save` wrote, read in one way: checked before, no code run, errors of one kind."""

from __future__ import annotations

import contextlib
import os
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lora_lightning.errors import AdapterFileError, nearest

CHUNK = 2**20  # bytes read at a time
SHOWN = 3  # tensors named of each kind that does not fit


def read_torch(
    path: str | os.PathLike[str],
    remedy: str,
    *,
    map_location: Any = "cpu",
    weights_only: bool | None = True,
    mmap: bool = False,
) -> Any:
    """What a file of `torch.save` holds. Its own checksums (CRC-32, one a tensor) are compared first: torch
    writes them and does not look at them.

    Args:
        remedy: what to do when it cannot be read; ends each message.
        map_location, weights_only, mmap: as in `torch.load`.

    Raises:
        AdapterFileError: it is missing, no regular file, locked, empty, cut short, damaged, of another kind,
            or holds code; nothing in it was run.
    """
    path = Path(path)
    require_file(path, remedy)
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise AdapterFileError(f"{path} is empty (0 bytes). {remedy}")
            if fault := _broken_record(file):
                raise AdapterFileError(f"{path} is damaged: {fault}. {remedy}")
            file.seek(0)
            return _loaded(path, path if mmap else file, remedy, map_location, weights_only, mmap)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}. {remedy}") from None


def require_file(path: Path, remedy: str) -> None:
    """Refuse what is no regular file, before it is opened: to open a named pipe waits for ever.

    Raises:
        AdapterFileError: it is something else, or nothing; a near miss in the same folder is named.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        gone = "is a link that leads nowhere" if path.is_symlink() else "does not exist"
        raise AdapterFileError(f"{path} {gone}. {remedy}{_near(path)}") from None
    except (OSError, ValueError) as error:  # a name with a null character
        raise AdapterFileError(f"{path!s:.200} cannot be read: {_reason(error)}. {remedy}") from None
    if stat.S_ISDIR(mode):
        raise AdapterFileError(f"{path} is a folder, not a file. {remedy}")
    if not stat.S_ISREG(mode):
        raise AdapterFileError(f"{path} is a pipe, a socket or a device, not a regular file. {remedy}")


def torch_reasons(error: RuntimeError) -> list[str]:
    """The single faults that torch's `load_state_dict` names, the first three, a line each."""
    return [" ".join(line.split())[:300] for line in str(error).splitlines()[1 : 1 + SHOWN]]


def _loaded(path: Path, file: Any, remedy: str, map_location: Any, safe: bool | None, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location=map_location, weights_only=safe, mmap=mmap)
    except Exception as error:  # torch raises many kinds for damaged, foreign and unsafe files
        unsafe = "unsupported global" in str(error).lower()
        reason = "it is damaged, cut short or not a checkpoint"
        reason = "it holds code; nothing in it was run" if unsafe else reason
        raise AdapterFileError(f"{path} cannot be read: {reason}. {remedy}") from None


def _broken_record(file: BinaryIO) -> str | None:
    """Why a record of torch's archive is not what was written, if one is not. Older formats and other files
    are left to torch."""
    size = os.fstat(file.fileno()).st_size
    try:
        if not zipfile.is_zipfile(file):
            return None
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if all(r.CRC == 0 for r in records):  # torch.serialization.set_crc32_options(False)
                return None
            if any(r.compress_type != zipfile.ZIP_STORED for r in records) or (
                sum(r.file_size for r in records) > size
            ):
                return "it claims to hold more than there is"  # torch.save does not compress
            for record in records:
                with archive.open(record) as content:
                    while content.read(CHUNK):
                        pass
    except Exception as error:  # zipfile raises many kinds for archives that are none
        return str(error) or type(error).__name__
    return None


def _near(path: Path) -> str:
    """The name most like the first part of the path that does not exist."""
    while not path.parent.is_dir() and path != path.parent:
        path = path.parent
    with contextlib.suppress(OSError):
        if near := nearest(path.name, [p.name for p in path.parent.iterdir()]):
            return f" Did you mean {path.parent / near[0]}?"
    return ""


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
