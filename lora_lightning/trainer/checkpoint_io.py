"""How a Trainer's checkpoints are written and read: whole, checked, with errors of ours."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO

from lora_lightning.files.checkpoint_read import GIVE
from lora_lightning.utils.atomic import make_folder, write_whole
from lora_lightning.utils.torch_file import read_torch


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
        return read_torch(path, GIVE, map_location=map_location, weights_only=weights_only)


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
