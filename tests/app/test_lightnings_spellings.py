"""Options of Lightning's Trainer: what it takes is taken, what it refuses is refused before it is asked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from lora_lightning.app.arguments import at_home
from lora_lightning.app.check import problems_of
from lora_lightning.app.cli import main
from lora_lightning.app.compose import shipped
from lora_lightning.app.options import PRECISIONS, precision_of
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.optim_config import OptimConfig

VALUES: dict[str, list[Any]] = {
    "precision": [32, 16, 64, "32", "16", "64", "bf16", None, *PRECISIONS, "fp16", 8],
    "devices": [1, 2, "1", "auto", -1, "-1", "0,1", [0], "two"],
    "max_time": [None, "00:01:00:00", {"minutes": 5}, "12h", 5],
    "val_check_interval": [None, 5, 10.0, 0.5, 2.5, "00:00:10:00", {"minutes": 5}],
    "limit_train_batches": [None, 2, 2.0, 0.5, 1.5, "2", -1],
    "limit_val_batches": [0, 1.0],
    "overfit_batches": [0, 3, 2.0, 0.1, None],
    "log_every_n_steps": [0, 5, None],
    "num_sanity_val_steps": [None, -1, 0, 2],
    "gradient_clip_val": [None, 0, 1, 0.5, "1"],
    "deterministic": [None, True, False, "warn"],
    "enable_progress_bar": [None, False],
    "strategy": ["auto", "ddp", "DDP", "ddp_find_unused_parameters_true", "dpp", None],
}
CONFIG = shipped().compose_groups(())


def taken_by_lightning(option: str, value: Any) -> bool:
    options = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False, option: value}
    try:
        Trainer(**options, enable_checkpointing=False, enable_model_summary=False)
    except Exception:  # of a dozen kinds
        return False
    return True


@pytest.mark.parametrize("option", VALUES)
def test_what_lightning_takes_is_taken(option: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    for value in VALUES[option]:
        config = CONFIG.copy()  # type: ignore[union-attr]
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        config.run_dir = "."
        config.trainer[option] = value
        problems = problems_of(config)
        assert (problems == []) == taken_by_lightning(option, value), (option, value, problems)
        assert all(problem.startswith(f"trainer.{option}=") for problem in problems)


def test_short_precisions_have_full_names() -> None:
    for value in (32, "32", 16, "16", "bf16", 64, *PRECISIONS):
        trainer = Trainer(precision=value, accelerator="cpu", logger=False, enable_checkpointing=False)
        # on a CPU float16 is not mixed: Lightning takes bfloat16
        assert (
            precision_of(value).replace("16-mixed", "bf16-mixed").replace("bfbf", "bf") == trainer.precision
        )


def test_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["data.root=~/x", "out=~", "a=b~/c", "~logger", "b=~c"]
    assert at_home(words) == [f"data.root={tmp_path}/x", f"out={tmp_path}", "a=b~/c", "~logger", "b=~c"]
    with pytest.raises(SystemExit):
        main(["merge", "ckpt=~/nothing", "out=~/x.safetensors"])
    assert f"{tmp_path}/nothing" in capsys.readouterr().err


def test_a_rate_that_yaml_takes_for_a_text() -> None:
    options = yaml.safe_load("{lr: 1e-3, weight_decay: 5e-2, betas: [9e-1, 0.999]}")
    assert options["lr"] == "1e-3"  # PyYAML wants 1.0e-3
    assert OptimConfig(**options) == OptimConfig(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999))
    with pytest.raises(ConfigError, match="lr='fast': give a number"):
        OptimConfig(lr="fast")  # type: ignore[arg-type]
