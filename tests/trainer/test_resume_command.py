"""`python train.py resume=FOLDER`: the same run, in its folder, under its W&B id."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lora_lightning as ll
from lora_lightning.app.application import main
from lora_lightning.app.resume import resumed
from lora_lightning.trainer.exact_resume import KEY

ROOT = Path(__file__).parents[2]
ADAPTER = Path("adapter") / "adapter_model.safetensors"
WORDS = ["data.train_size=64", "compare=[]", "logger=many", "trainer.enable_progress_bar=false"]


def test_the_words_that_began_the_run_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "a'b"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "overrides.yaml").write_text("- recipe=resnet_digits\n- +x=1\n- ckpt_path=old\n")
    given = ["--config-dir", "mine", "resume=a'b", "x=2"]
    own = [r"hydra.run.dir='a\'b'", "ckpt_path=last"]
    assert resumed(given) == ["--config-dir", "mine", "x=2", "recipe=resnet_digits", *own]
    assert resumed(["lora.rank=2"]) == ["lora.rank=2"]
    with pytest.raises(ll.ConfigError, match=r"resume=a'c: is not a run's folder.*Did you mean \"a'b\""):
        resumed(["resume=a'c"])


def test_a_run_goes_on_in_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    main([*WORDS, "trainer.max_epochs=1", "hydra.run.dir=run"])
    began = json.loads((tmp_path / "run" / "trackers.json").read_text())
    main(["resume=run", "trainer.max_epochs=2"])
    parts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert [part.name.rpartition("-")[2] for part in parts] == [began["wandb"]] * 2
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == began
    assert {p.name for p in (tmp_path / "run" / "csv").iterdir()} >= {"metrics.csv", "metrics.1.csv"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with pytest.raises(SystemExit):
        main(["resume=run", "trainer.max_epochs=2"])
    assert "the run is finished" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["resume=run", "trainer.max_epochs=1"])
    assert "has all 2 epochs behind it; give trainer.max_epochs above" in capsys.readouterr().err


def test_what_is_missing_is_done_and_nothing_is_trained_again(tmp_path, monkeypatch, capsys):
    """Stopped after the last epoch: before the test, the adapter, the report, or a method to compare with."""
    monkeypatch.chdir(tmp_path)
    main([*WORDS[:1], *WORDS[3:], "logger=csv", "trainer.max_epochs=1", "hydra.run.dir=run"])
    run = tmp_path / "run"
    wanted, adapter = json.loads((run / "results.json").read_text()), load_file(run / ADAPTER)
    with pytest.raises(SystemExit):
        main(["resume=run"])
    told = capsys.readouterr().err
    assert f"{run}: the run is finished" in told and "give trainer.max_epochs above 1" in told
    (run / "results.json").unlink(), (run / ADAPTER).unlink(), shutil.rmtree(run / "full")
    written = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    probe = (run / "linear_probe" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    main(["resume=run"])
    assert capsys.readouterr().err == ""
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == written
    assert (run / "linear_probe" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == probe
    again = json.loads((run / "results.json").read_text())
    for one, other in zip(wanted, again, strict=True):
        if one["method"] in ("lora", "linear_probe"):  # of the training, as the checkpoint has it
            folder = run if one["method"] == "lora" else run / one["method"]
            assert other["seconds"] > seconds_in(folder / "checkpoints" / "last.ckpt") > 0
        assert one["scores"] == other["scores"] and one["method"] == other["method"]
    assert all((value == adapter[name]).all() for name, value in load_file(run / ADAPTER).items())


def seconds_in(checkpoint: Path) -> float:
    return torch.load(checkpoint, weights_only=True)[KEY]["seconds"]


def test_its_own_recipes_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = tmp_path / "mine" / "recipe"
    recipes.mkdir(parents=True)
    (recipes / "small.yaml").write_text("# @package _global_\nlora: {rank: 2}\n")
    main([*WORDS, "--config-dir", "mine", "recipe=small", "trainer.max_epochs=1", "hydra.run.dir=run"])
    again = resumed(["resume=run"])
    assert again[:2] == ["--config-dir", str(recipes.parent)] and "recipe=small" in again
    assert resumed(["resume=run", "--config-dir", "other"])[:2] == ["--config-dir", "other"]
    main(["resume=run", "trainer.max_epochs=2"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lora"]["rank"] == 2
    (recipes / "other.yaml").write_text("data: {_target_: os.system, command: touch ran}\n")
    with pytest.raises(ll.ConfigError, match=r"it names .*os\.system.*--config-dir"):
        resumed(["resume=run"])
    (tmp_path / "run" / ".hydra" / "hydra.yaml").write_text("{")
    with pytest.raises(ll.ConfigError, match=r"hydra\.yaml cannot be read"):
        resumed(["resume=run"])


def test_folders_of_recipes_come_back_from_wherever_it_goes_on(tmp_path, monkeypatch):
    for name in ("own recipes", "there"):
        (tmp_path / name / "recipe").mkdir(parents=True)
    (tmp_path / "own recipes" / "recipe" / "small.yaml").write_text("# @package _global_\nlora: {rank: 2}\n")
    monkeypatch.setattr("lora_lightning.app.train.train", lambda config, _: config.lora.rank / 0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        main(["hydra.searchpath=['own recipes']", "recipe=small", "hydra.run.dir=there/run"])
    monkeypatch.chdir("there")
    assert resumed(["resume=run"])[0] == f"hydra.searchpath=['file://{tmp_path}/own recipes']"
    with pytest.raises(ZeroDivisionError):
        main(["resume=run"])
    assert "hydra.searchpath=[]" in resumed(["resume=run", "hydra.searchpath=[]"])
    (tmp_path / "own recipes" / "code.py").touch()
    with pytest.raises(ll.ConfigError, match=r"code\.py: it is code"):
        resumed(["resume=run"])


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_adapter(tmp_path):
    command = [sys.executable, "-u", str(ROOT / "train.py")]
    words = [*WORDS[:2], "lora.dropout=0.1", "trainer.max_epochs=12", "trainer.accumulate_grad_batches=2"]
    options = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    subprocess.run([*command, *words, "hydra.run.dir=whole"], check=True, capture_output=True, **options)
    to_kill = [*command, *words, "hydra.run.dir=killed"]
    process = subprocess.Popen(to_kill, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    shown = (line for line in process.stdout if line.startswith("LoRA "))
    next(shown), next(shown)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "resume=killed"], check=True, capture_output=True, **options)
    one, other = (load_file(tmp_path / run / ADAPTER) for run in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
