"""The console command: what it prints, and what it says to mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning import inject, save_adapter
from lora_lightning.app.arguments import parser_of
from lora_lightning.app.cli import COMMANDS, main
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
    page = capsys.readouterr().out
    assert all(f"\n  {command} " in page for command in COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("train", "completion")])
def test_a_page_shows_every_option_as_it_is_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    page = capsys.readouterr().out
    assert caught.value.code == 0 and f"lora-lightning {command}" in page
    assert all(f"\n  {written}" in page for written in parser_of(command).keys.values())
    assert "--" not in page.replace("--help", "").replace("--config-dir FOLDER", "")
    assert all(len(line) <= 110 for line in page.splitlines())


NO_SUCH = "there is no such option."
LINES = {
    "merge": ["give ckpt=PATH and out=FILE.safetensors."],
    "merge ckpt=. otu=x": ["give out=FILE.safetensors.", f"otu=x: {NO_SUCH} Did you mean 'out'"],
    "merge ckpt=. out=x out=y": ["out: is given twice: give it once."],
    "merge ckpt=. out= overwrite=yes": ["out=: give a text", "overwrite=yes: give true or false"],
    "inspect . .": ["give one path."],
    "inspect adapter=.": ["give one path.", "adapter=.: give the path alone: lora-lightning inspect ."],
    "inspect pyproject.toml run=nowhere base=.": [
        "run=nowhere: give the path alone: lora-lightning inspect nowhere (there is no such file or folder."
    ],
    "report": ["give the folder of a run, or of several."],
    "report nowhere . otu=x": [
        "nowhere: there is no such file",
        "otu=x: there is no such option. Did you mean 'out'",
    ],
    "inspect . bse=x base=nowhere": [
        f"bse=x: {NO_SUCH} Did you mean 'base'",
        "base=nowhere: there is no such file",
    ],
    "shrink adapter=. out=x energy=2 budget=0 adaptr=.": [
        f"adaptr=.: {NO_SUCH} Did you mean 'adapter'",
        "energy=2: give a number above 0 and at most 1",
        "budget=0: give a whole number of at least 1",
    ],
    "extract tuned=nowhere rank=no format=pft": [
        "give out=FOLDER.",
        "tuned=nowhere: there is no such file",
        "rank=no: give a whole number",
        "format=pft: give one of lora_lightning, peft.",
    ],
    "transcribe . adaptr": ["adaptr: there is no such file", "give adapter=FOLDER, or recipe=NAME"],
    "transcribe . recipe=x chunk=2 overlap=3": ["overlap=3: give seconds from 0 to half of chunk=2."],
    "transcribe . --form=srt recipe=x beam=0": [f"--form=srt: {NO_SUCH}", "beam=0: give a whole number"],
    "predict score=2 batch_size=two": [
        "give out=FILE|FOLDER.",
        "score=2: give",
        "batch_size=two: give a whole",
    ],
    "serve": ["nothing to serve is named"],
    "serve adapters=nowhere": ["adapters=nowhere: there is no such"],
    "completion fish": ["completion fish: give bash or zsh."],
}


@pytest.mark.parametrize("line", LINES)
def test_every_mistake_of_a_command_is_told_at_once(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = LINES[line]
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    out, message = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert len(message.splitlines()) == len(told)
    assert all(words in message for words in told), message


def test_merge_writes_plain_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    inject(model, LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    layer: Any = model[0]
    nn.init.normal_(layer.lora["default"]["weight"].lora_B)
    save_adapter(model, tmp_path / "adapter")
    words = ["merge", "base=base.safetensors", "ckpt=adapter", "--out", "merged.safetensors"]
    main(words)
    assert "merged.safetensors: 4 tensors of float32\n2 updates merged" in capsys.readouterr().out
    merged = load_file(tmp_path / "merged.safetensors")
    torch.testing.assert_close(merged["0.weight"], layer.weight.detach())
    with pytest.raises(SystemExit):
        main(words)
    assert "overwrite=true to replace it" in capsys.readouterr().err


WITHOUT = """import sys
sys.modules.update(dict.fromkeys(("hydra", "omegaconf", "timm")))
from lora_lightning.app.cli import main
main(sys.argv[1:])"""


def test_training_says_what_it_needs(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT, "train"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "this needs hydra: pip install 'lora-lightning[recipes]'\n"


@pytest.mark.slow
def test_files_are_looked_at_with_the_cores_own_dependencies(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    inject(model, LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    save_adapter(model, tmp_path)
    command = [sys.executable, "-c", WITHOUT, "inspect", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert "8×6" in run.stdout, run.stderr


def test_a_damaged_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    inject(model, LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path)])
    assert "is damaged" in capsys.readouterr().err
