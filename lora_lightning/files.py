"""Files written whole or not at all: what stood there before stays until the new file is complete."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from safetensors import SafetensorError

from lora_lightning.errors import FULL, WriteError
from lora_lightning.torch_file import read_torch
from lora_lightning.writers import put_in_place, workplace


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
    with _told(folder):
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
    with _told(folder if len(files) > 1 else path), workplace(folder) as place:
        for number, (path, write) in enumerate(files.items()):
            temporary = place / f"{number}.{path.name}"
            with _told(path):
                write(str(temporary))
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.chmod(temporary, place.stat().st_mode & 0o666)  # as the umask allows
                if path.is_dir() and not path.is_symlink():
                    raise IsADirectoryError(errno.EISDIR, "a folder stands in the place of the file")
        put_in_place(place, [p.name for p in files])
        _sync_folder(folder)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
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


class WholeCheckpointIO(TorchCheckpointIO):
    """Trainer checkpoints written whole, and read with errors of ours. Lightning writes to the system's
    temporary folder and moves the file, which is a copy, and not atomic, when that folder lies on another
    disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # torch's own file writer hides that a disk is full
        torch.save(checkpoint, buffer)
        make_folder(Path(path).parent)
        write_whole(Path(path), lambda temporary: Path(temporary).write_bytes(buffer.getbuffer()))

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        remedy = "Give a checkpoint that a Trainer wrote."
        return read_torch(path, remedy, map_location=map_location, weights_only=weights_only)


class Keeping(CheckpointIO):
    """A wrapper of another writer, such as AsyncCheckpointIO, that keeps that writer: Lightning's strategies
    put a TorchCheckpointIO into a wrapper each time they use it."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper, self.writer = wrapper, wrapper.checkpoint_io

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wrapper.checkpoint_io = self.writer
        self.wrapper.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, *args: Any, **options: Any) -> Any:
        return self.writer.load_checkpoint(*args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        self.writer.remove_checkpoint(path)

    def teardown(self) -> None:
        self.wrapper.teardown()


def write_checkpoints_whole(strategy: Any) -> None:
    """Let a Trainer's strategy write its checkpoints by WholeCheckpointIO, unless the user chose another
    way of writing; what wraps the writer (AsyncCheckpointIO) stays."""
    io = strategy._checkpoint_io  # read as `checkpoint_io`, a wrapper loses its writer
    if io is None or type(io).__name__ == "TorchCheckpointIO":
        strategy.checkpoint_io = WholeCheckpointIO()
    elif hasattr(io, "checkpoint_io"):
        if io.checkpoint_io is None or type(io.checkpoint_io).__name__ == "TorchCheckpointIO":
            io.checkpoint_io = WholeCheckpointIO()
        strategy.checkpoint_io = Keeping(io)


def _sync_folder(folder: Path) -> None:
    """Make renames last through a power failure, where the system can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
