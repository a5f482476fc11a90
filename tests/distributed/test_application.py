"""The application on several devices: configurations, submitit's and SLURM's processes, ckpt_path=last."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import open_dict
from processes import ROOT, finish, free_port, start

from lora_lightning.app import check, variants
from lora_lightning.app.check import last_checkpoint
from lora_lightning.app.command_line import CommandLine
from lora_lightning.app.compose import shipped
from lora_lightning.errors import ConfigError

TRAINERS = sorted(p.stem for p in (ROOT / "conf" / "trainer").glob("*.yaml"))
TINY = ["debug=fast", "compare=[]", "trainer.enable_progress_bar=false"]


def compose(*words: str):
    return shipped().compose(words)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_is_valid_where_its_devices_are(trainer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(check, "find_spec", lambda name: object())
    monkeypatch.setenv("NODE_RANK", "0")
    config = compose(f"trainer={trainer}")
    with open_dict(config):
        del config["hydra"]
        config.run_dir = "."
    assert check.problems_of(config) == []


@pytest.mark.parametrize("words", ["trainer=deepspeed", "trainer=gpu trainer.strategy=deepspeed_stage_2"])
def test_without_deepspeed_one_message_says_what_to_install(words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"1 problem.*\n.*eeds DeepSpeed: pip install deepspeed"):
        CommandLine(words.split()).check()


@pytest.mark.parametrize("launcher", ["slurm", "local", "submitit_slurm"])
def test_without_submitit_one_message_says_what_to_install(launcher, monkeypatch):
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs submitit: pip install 'lora-lightning\[slurm\]'"):
        CommandLine(["-m", f"hydra/launcher={launcher}"]).check()


def test_a_slurm_job_has_a_task_for_each_device():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = compose("hydra/launcher=slurm", "trainer=model_parallel").hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (1, 2, 2)
    CommandLine(["-m", "hydra/launcher=slurm", "lora.rank=2,4"]).check()


def test_last_is_the_runs_own_checkpoint_or_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    file = tmp_path / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    done = {"fit_loop": {"epoch_progress": {"current": {"started": 2, "processed": 2}}}}
    torch.save({"state_dict": {}, "optimizer_states": [], "epoch": 1, "loops": done}, file)
    assert (
        last_checkpoint(tmp_path, 3) == last_checkpoint(tmp_path, 2) == str(file)
    )  # what is behind it may lack
    with pytest.raises(ConfigError, match="has all 2 epochs behind it"):
        last_checkpoint(tmp_path, 1)
    file.write_bytes(b"half")
    with pytest.raises(ConfigError, match="cannot be read"):
        last_checkpoint(tmp_path)


def accuracy(folder: Path) -> float:
    return json.loads((folder / "results.json").read_text())[0]["scores"]["acc"]


@pytest.mark.slow
def test_two_processes_test_and_calibrate_as_one_does(tmp_path):
    """Every picture counts once: the same scores, intervals and temperature, and the same parts of a page."""
    found = {}
    for trainer in ("cpu", "ddp_sim"):
        words = ["method=none", "compare=[]", f"trainer={trainer}", f"hydra.run.dir={trainer}"]
        code, out, errors = finish(start([ROOT / "train.py", *words, "task.test_flips=true"], cwd=tmp_path))
        assert code == 0, errors
        (result,) = json.loads((tmp_path / trainer / "results.json").read_text())
        temperature = next(line for line in out.splitlines() if line.startswith("Temperature"))
        parts = (tmp_path / trainer / "report" / "sections.json").read_bytes()
        found[trainer] = (result["scores"], result["intervals"], temperature, parts)
    assert found["cpu"] == found["ddp_sim"]
    assert {"acc", "ece", "ece_raw", "source"} < found["cpu"][0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpu", "ddp_sim"])
def test_submitit_runs_each_job_of_a_sweep(trainer, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = [ROOT / "train.py", "-m", "hydra/launcher=local", f"trainer={trainer}", "hydra.sweep.dir=sweep"]
    code, _, errors = finish(start([*words, *TINY, "lora.rank=2,4"], cwd=tmp_path))
    assert code == 0, errors
    for job in range(2):
        assert accuracy(tmp_path / "sweep" / str(job)) > 0


@pytest.mark.slow
def test_a_mistake_in_a_job_of_submitit_is_one_message(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = [
        ROOT / "train.py",
        "-m",
        "hydra/launcher=local",
        "lora.target_modules=[qvk]",
        "hydra.sweep.dir=sweep",
    ]
    code, _, errors = finish(start([*words, *TINY], cwd=tmp_path))
    assert code == 2
    assert "lora.target_modules: 'qvk' matches no layer" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_srun_starts_the_processes_and_a_requeued_job_goes_on(tmp_path):
    """The variables that srun gives to two tasks on one machine; the second time the job has a checkpoint."""
    words = ["trainer=ddp_sim", "ckpt_path=last", "hydra.run.dir=run", *TINY]
    for epochs in (1, 2):
        port = free_port()
        tasks = [
            start(
                [ROOT / "train.py", *words, f"trainer.max_epochs={epochs}"],
                cwd=tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, SLURM_JOB_ID=7,
                SLURM_JOB_NAME="train", SLURM_NTASKS=2, SLURM_NTASKS_PER_NODE=2, SLURM_NNODES=1,
                SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NODEID=0,
            )
            for rank in range(2)
        ]  # fmt: skip
        done = [finish(task) for task in tasks]
        assert [code for code, _, _ in done] == [0, 0], done
        assert ("resumed from" in done[0][1]) == (epochs == 2)
        assert not done[1][1]  # the first process alone prints
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
