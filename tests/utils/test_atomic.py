"""Files are written whole: on a full disk the old one stays and nothing else is left."""

import errno
import os
from pathlib import Path

import pytest
import torch

from lora_lightning.trainer.checkpoint_io import WholeCheckpointIO
from lora_lightning.utils.atomic import write_whole


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_whole(path, lambda name: Path(name).write_text("old"))

    def interrupted(name: str) -> None:
        Path(name).write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_trainer_checkpoint_on_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / "last.ckpt"
    io = WholeCheckpointIO()
    io.save_checkpoint({"a": torch.ones(3)}, path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"a": torch.zeros(3)}, path)
    assert torch.equal(io.load_checkpoint(path)["a"], torch.ones(3))
    assert os.listdir(path.parent) == ["last.ckpt"]
