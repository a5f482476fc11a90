"""The console command: what it prints, and what it says to mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from lora_lightning import inject, save_adapter
from lora_lightning.app.cli import main
from lora_lightning.config import LoRAConfig


def test_inspect_shows_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    inject(model, LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    save_adapter(model, tmp_path / "adapter")
    main(["inspect", str(tmp_path / "adapter")])
    out = capsys.readouterr().out
    assert "8×6" in out
    assert "target_modules=all, modules_to_save=None" in out
    assert "4 tensors" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", "nowhere"], "nowhere: there is no such file or folder"),
        (["inspect"], "give one path"),
        (["trian"], "Did you mean 'train'"),
        (["train", "lora.rank=0"], "lora.rank=0: give a whole number"),
    ],
)
def test_a_mistake_is_one_message(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, message = capsys.readouterr()
    assert caught.value.code == 2
    assert told in message
    assert "Traceback" not in message
    assert out == ""


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "lora-lightning inspect PATH" in capsys.readouterr().out


def test_a_damaged_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    inject(model, LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path)])
    assert "is damaged" in capsys.readouterr().err
