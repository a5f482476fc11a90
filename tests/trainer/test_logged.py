"""What the Trainer's loggers are told of an adapter: fakes, and the real CSV, TensorBoard and W&B offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from small import Classifier, cnn, loader, trainer

import lora_lightning as ll


class Recorder(Logger):
    """Keeps the hyperparameters that it is given, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []

    name = version = "recorder"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.told.append(dict(params))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...


class Owner(Classifier):
    """With hyperparameters of its own, one of which is called lora."""

    def __init__(self, lora: str = "mine", width: int = 3) -> None:
        super().__init__(cnn())
        self.save_hyperparameters()


def fit(
    tmp_path: Path, callback: ll.LoRACallback, *loggers: Logger, module: Any = None, **options: Any
) -> Any:
    module = module or Owner()
    run = trainer(tmp_path, callback, logger=list(loggers), max_steps=1, **options)
    run.fit(module, loader())
    return module


def test_every_logger_is_told_once_beside_the_modules_own(tmp_path):
    one, other = Recorder(), Recorder()
    callback = ll.LoRACallback(rank=2, rank_pattern={"6": 1})
    module = fit(tmp_path, callback, one, other)
    own, mine = {"lora": "mine", "width": 3}, ll.LoRAConfig(rank=2, rank_pattern={"6": 1}).to_dict()
    for recorder in (one, other):
        merged: dict[str, Any] = {}
        for params in recorder.told:
            merged.update(params)
        about = merged.pop("LoRACallback")
        assert merged == own
        assert {k: about[k] for k in mine} == mine
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        assert (about["trainable_parameters"], about["total_parameters"]) == (trained, total)
        assert about["trainable_fraction"] == pytest.approx(trained / total, abs=1e-6)
        assert about["adapted_layers"] == len(callback.plan.layers)
        assert about["adapter"] == "default"
    fit(tmp_path, callback, one, module=module)
    assert sum("LoRACallback" in params for params in one.told) == 2  # the loggers are others
    fit(tmp_path, callback, one, module=module)
    assert sum("LoRACallback" in params for params in one.told) == 2  # told already


def test_nobody_is_told_where_the_trainer_logs_nothing(tmp_path):
    recorder = Recorder()
    fit(tmp_path, ll.LoRACallback(rank=2), recorder, enable_autolog_hparams=False)
    assert recorder.told == []


def test_only_the_first_process_tells(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(pl.Trainer, "is_global_zero", property(lambda self: False))
    fit(tmp_path, ll.LoRACallback(rank=2), recorder)
    assert not any("LoRACallback" in params for params in recorder.told)


def test_csv_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    for rank in (2, 4):
        folder = tmp_path / str(rank)
        loggers = [CSVLogger(folder, "csv", ""), TensorBoardLogger(folder, "tb", "")]
        fit(tmp_path, ll.LoRACallback(rank=rank), *loggers)
        for name in ("csv", "tb"):
            saved = yaml.safe_load((folder / name / "hparams.yaml").read_text())
            assert saved["LoRACallback"]["rank"] == rank
            assert (saved["lora"], saved["width"]) == ("mine", 3)
        events = EventAccumulator(str(folder / "tb"))
        events.Reload()
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        assert shown["LoRACallback/rank"].number_value == rank
        assert shown["lora"].string_value == "mine"


@pytest.mark.slow
def test_wandb_tells_two_ranks_apart(tmp_path, monkeypatch):
    import wandb
    from wandb_file import read_wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    for rank in (4, 8):
        logger = WandbLogger(project="p", save_dir=tmp_path / str(rank), mode="offline")
        fit(tmp_path, ll.LoRACallback(rank=rank), logger)
        wandb.finish()
        (file,) = (tmp_path / str(rank)).glob("wandb/offline-run-*/*.wandb")
        config = read_wandb(file).config
        assert config["LoRACallback"]["rank"] == rank
        assert config["LoRACallback"]["trainable_parameters"] > 0
        assert (config["lora"], config["width"]) == ("mine", 3)
