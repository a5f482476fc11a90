"""Around a job: errors as one message, exit codes, quiet, and what a started process is told."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf

from lora_lightning.app import train
from lora_lightning.app.application import main
from lora_lightning.app.check import checkpoint_problems
from lora_lightning.app.launch import (
    FAILED,
    INTERRUPTED,
    LOST,
    MISTAKE,
    PREEMPTED,
    PROGRAM,
    explain,
    hydra_raises,
    one_job,
    quiet,
    reported,
)
from lora_lightning.app.results import Result, results_table
from lora_lightning.app.sweep import Ended
from lora_lightning.errors import ConfigError, MissingFileError
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.tasks.classification_scores import scores_of
from lora_lightning.tasks.scores import Score

TINY = ["debug=fast", "compare=[]", "trainer.enable_progress_bar=false", "hydra.run.dir=run"]


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(words)
    return caught.value.code, capsys.readouterr().err  # type: ignore[return-value]


def raising(error: BaseException) -> Any:
    def run(*_: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError(["rank=0: give more."]), MISTAKE, "rank=0: give more."),
        (MissingFileError("CIFAR-10 is not here"), MISTAKE, "CIFAR-10 is not here"),
        (OSError(errno.ENOSPC, "No space left on device", "run/x.ckpt"), MISTAKE, "No space left"),
        (RuntimeError("write: No space left on device (os error 28)"), MISTAKE, "hydra.run.dir=FOLDER"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), MISTAKE, "Cannot write /x"),
        (KeyboardInterrupt(), INTERRUPTED, "Interrupted."),
        (RuntimeError("[pair.cc] Connection closed by peer [10.0.0.2]:1"), LOST, "of this run has gone"),
        (SIGTERMException(), PREEMPTED, "Ended by SIGTERM."),
        (torch.OutOfMemoryError("CUDA out of memory"), MISTAKE, "data.batch_size"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_in_a_job_is_one_message(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(train, "train", raising(error))
    found, message = fails(TINY, capsys)
    assert found == code
    assert told in message
    assert "Traceback" not in message
    assert message.count(told) == 1


class Broken(CSVLogger):
    """A logger that cannot tell what it is told."""

    def __init__(self, folder: Path, error: Exception) -> None:
        super().__init__(folder)
        self.error = error

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/elsewhere/wandb"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/elsewhere"), "Permission denied"),
        (ConnectionError("the server does not answer"), "the server does not answer. The run ends"),
    ],
)
def test_a_logger_that_fails_in_training_is_named(tmp_path: Path, error: Exception, said: str) -> None:
    """And not the run's disk; but where it writes into the run's own folder that is what is full."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(type(error)) as caught:
        Broken(tmp_path / "run", error).log_metrics({})
    message, code = explain(caught.value, tmp_path / "run")  # type: ignore[misc]
    assert code == FAILED and message.startswith("Broken has failed: ") and said in message
    assert "logger=csv" in message and "resume=" in message and "hydra.run.dir" not in message
    if isinstance(error, PermissionError):
        error.filename = str(tmp_path / "run" / "csv")
        assert "hydra.run.dir" in explain(caught.value, tmp_path / "run")[0]  # type: ignore[index]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(TINY)


def test_tracebacks_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError):
        main(["lora.rank=0"])
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_lightnings_way_of_leaving_after_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()

    def leave() -> None:
        with reported(tmp_path):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)

    with pytest.raises(SystemExit) as caught:
        leave()
    assert caught.value.code == INTERRUPTED
    assert explain(SystemExit(3)) is None
    assert explain(caught.value) is None  # reported already
    assert f"resume={os.path.relpath(tmp_path)}" in explain(KeyboardInterrupt(), tmp_path)[0]  # type: ignore[index]


def test_no_space_while_saving_leaves_nothing_half_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    def full(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr("lora_lightning.files.pair.save_file", full)
    code, message = fails(TINY, capsys)
    assert code == MISTAKE
    assert len(message.strip().splitlines()) == 1
    assert [p.name for p in (tmp_path / "run" / "adapter").iterdir()] == []


def test_no_space_while_hydra_writes_its_own_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/.hydra/config.yaml")

    monkeypatch.setattr("hydra.core.utils._save_config", full)
    code, message = fails(TINY, capsys)
    assert code == MISTAKE
    assert "No space left on the device for run/.hydra/config.yaml" in message


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    code, message = fails([*TINY[:-1], "hydra.run.dir=file/run"], capsys)
    assert code == MISTAKE
    assert "hydra.run.dir" in message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["+lora.rank_pattern={blocks.0.attn.qkv: 200}"], "blocks.0.attn.qkv"),
        (["lora.target_modules=[qkvv]"], "lora.target_modules: 'qkvv' matches no layer. Did you mean"),
        (["model.name=vit_tinny_patch16_224"], "model.name=vit_tinny_patch16_224: give a model of timm"),
        (["model.checkpoint=nowhere.safetensors"], "nowhere.safetensors"),
        (["model.depth=5"], "does not fit"),
        (["+model.depht=5"], "model.depht=5 is not an option"),
        (["+model.head_dim=5", "model.name=foo"], "model.name=foo: give a model of timm"),
        (["optim.head_lr=1e-3", "lora.modules_to_save=null", "+lora.exclude_modules=[head]"], "head_lr"),
    ],
)
def test_mistakes_that_only_the_model_shows(words: list[str], told: str, capsys: Any) -> None:
    code, message = fails([*TINY, *words], capsys)
    assert code == MISTAKE
    assert told in message
    assert "Traceback" not in message


def test_a_checkpoint_is_looked_at_before_anything_runs(tmp_path: Path) -> None:
    good = tmp_path / "good.ckpt"
    done = {"fit_loop": {"epoch_progress": {"current": {"started": 5, "processed": 5}}}}
    torch.save({"state_dict": {"w": torch.zeros(9)}, "optimizer_states": [], "epoch": 4, "loops": done}, good)
    assert checkpoint_problems(str(good), 6) == []
    assert checkpoint_problems(str(good), 5, trained=True) == []
    assert "max_epochs above 5" in checkpoint_problems(str(good), 5)[0]
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(good.read_bytes()[:200])
    empty = tmp_path / "empty.ckpt"
    empty.touch()
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"weights": torch.zeros(2)}, foreign)
    weights = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {}}, weights)
    for path, told in [
        (cut, "damaged"),
        (empty, "is empty"),
        (foreign, "no state_dict"),
        (weights, "weights only"),
        (tmp_path, "is a folder"),
        (tmp_path / "goood.ckpt", f"Did you mean {good}"),
    ]:
        problems = checkpoint_problems(str(path))
        assert len(problems) == 1
        assert told in problems[0]
        assert problems[0].startswith(f"ckpt_path={path}: ")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_a_malicious_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "x": Malicious()}, tmp_path / "evil.ckpt")
    assert "nothing in it was run" in checkpoint_problems(str(tmp_path / "evil.ckpt"))[0]
    assert not (tmp_path / "ran").exists()


def test_quiet_hides_hints_and_keeps_warnings() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with quiet(), warnings.catch_warnings(record=True) as caught:
        assert logger.level == logging.WARNING
        warnings.warn("The 'val_dataloader' does not have many workers which may be", stacklevel=1)
        warnings.warn("loss is not finite", stacklevel=1)
    assert [str(w.message) for w in caught] == ["loss is not finite"]
    assert logger.level == before


def test_a_started_process_runs_its_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lightning copies for the other processes of a job: no sweep, the job's folder."""
    hydra = OmegaConf.create(
        {
            "hydra": {
                "overrides": {
                    "task": ["recipe=own", "lora.rank=${seed}"],
                    "hydra": ["hydra.mode=MULTIRUN", "hydra.sweep.dir=s"],
                },
                "runtime": {
                    "output_dir": "/s/1",
                    "config_sources": [
                        {"provider": "command-line", "schema": "file", "path": "/mine"},
                        {"provider": "command-line", "schema": "one-recipe", "path": "/a/own.yaml"},
                    ],
                },
                "run": {"dir": "elsewhere"},
            }
        }
    )
    monkeypatch.setattr(HydraConfig.instance(), "cfg", hydra)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "--config-dir", "/mine", "lora.rank=2,4"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with hydra_raises(), one_job():
        words = ["--config-dir=/mine", "recipe=/a/own.yaml", "lora.rank=${seed}", "hydra.mode=RUN"]
        assert sys.argv == [str(PROGRAM), *words]
        assert HydraConfig.get().run.dir == "/s/1"
        assert "HYDRA_FULL_ERROR" not in os.environ
        os.environ["LOCAL_RANK"] = "0"  # as Lightning's launcher does
    assert sys.argv[1] == "-m"
    assert "LOCAL_RANK" not in os.environ


def test_the_table_of_results() -> None:
    results = [
        Result("none", {"acc": 0.337}, 0, 1000),
        Result("lora", {"acc": 0.634}, 50, 1050, 12.34, 360_000),
    ]
    table = results_table(results, ImageClassifier.scores).splitlines()
    assert table[2].split() == ["before", "adaptation", "33.7", "0", "0.00", "–", "–"]
    assert table[3].split() == ["LoRA", "63.4", "50", "4.76", "12.3", "0.36"]
    assert len({len(line) for line in table[1:]}) == 1


def test_a_table_too_wide_for_a_screen_is_two() -> None:
    """Scores, then costs; without what no result has, or what is for the page alone."""
    bounds = {"acc": (0.6, 0.7), "f1": (0.5, 0.6), "top5": (0.9, 1.0), "ece": (0.0, 0.1)}
    values = {"acc": 0.65, "f1": 0.55, "top5": 0.95, "ece": 0.05, "ece_raw": 0.07}
    result = Result("lora", values, 50, 1050, 12.34, 360_000, intervals=bounds)
    scores = scores_of("class", 10, True)
    assert {"source", "ece_raw"} < {s.name for s in scores}
    table, costs = results_table([result], scores).split("\n\n")
    lines = [re.split(r"\s{2,}", line) for line in (table.splitlines()[0], table.splitlines()[2])]
    assert lines == [
        ["method", "test accuracy %", "top-5 %", "macro F1 %", "calibrated ECE %"],
        ["LoRA", "65.0 (60.0–70.0)", "95.0 (90.0–100.0)", "55.0 (50.0–60.0)", "5.0 (0.0–10.0)"],
    ]
    assert costs.splitlines()[2].split() == ["LoRA", "50", "4.76", "12.3", "0.36"]
    assert len(results_table([result], scores[:1]).split("\n\n")) == 1


def test_error_rates_have_intervals_and_say_what_has_gone() -> None:
    scores = (Score("wer", "WER %", fewer=True), Score("wer_us", "us WER %"))
    results = [
        Result("none", {"wer": 0.6, "wer_us": 0.05}, 0, 1000, intervals={"wer": (0.55, 0.66)}),
        Result("lora", {"wer": 0.15, "wer_us": 0.2}, 50, 1050, intervals={"wer": (0.12, 0.18)}),
    ]
    lines = [re.split(r"\s{2,}", line.strip()) for line in results_table(results, scores).splitlines()]
    assert lines[0][:4] == ["method", "test WER %", "fewer %", "us WER %"]
    assert lines[2][:4] == ["before adaptation", "60.0 (55.0–66.0)", "–", "5.0"]
    assert lines[3][:4] == ["LoRA", "15.0 (12.0–18.0)", "75", "20.0"]
    assert "fewer %" not in results_table(results[1:], scores)


def test_a_sweep_goes_on_after_a_bad_job(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """The reason of a mistake and of a bug stands under the table, whose other rows are as ever."""
    scores = (Score("acc", "accuracy %"),)

    def run(config: Any, tell: Callable[[Ended], None]) -> float:
        if config.lora.rank == 3:
            raise ConfigError(["lora.rank=3: is odd."])
        if config.lora.rank == 4:
            raise ZeroDivisionError("ours")
        words = HydraConfig.get().overrides.task
        tell(Ended(words, Result("lora", {"acc": 0.5}, 50, 1000), scores))
        return 0.5

    monkeypatch.setattr(train, "train", run)
    with pytest.raises(SystemExit) as caught:
        main(["-m", *TINY[:-1], "lora.rank=2,3,4,5", "hydra.sweep.dir=sweep"])
    out, errors = capsys.readouterr()
    assert caught.value.code == FAILED
    rows = [line.split() for line in out.splitlines()]
    assert ["lora.rank=2", "50.0", "50", "5.00", "–", "–"] in rows
    assert ["lora.rank=3", "(failed)", "–", "–", "–", "–", "–"] in rows
    assert ["lora.rank=5", "50.0", "50", "5.00", "–", "–"] in rows
    assert "2 of 4 jobs failed:\n  lora.rank=3: lora.rank=3: is odd.\n" in out
    assert "  lora.rank=4: ZeroDivisionError: ours" in out
    assert errors.count("Traceback") == 1  # the bug's
    assert errors.count("is odd") == 1


@pytest.fixture
def heeded():
    """Ctrl-C is not ignored, as it is in what a script has started in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_ends_a_whole_sweep(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    begun: list[int] = []

    def run(config: Any, tell: object) -> None:
        begun.append(config.lora.rank)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "train", run)
    code, message = fails(["-m", *TINY[:-1], "lora.rank=2,3", "hydra.sweep.dir=sweep"], capsys)
    assert (code, message.strip(), begun) == (INTERRUPTED, "Interrupted.", [2])


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_that_a_library_turns_into_another_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(config: Any, tell: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy could not be imported") from None

    monkeypatch.setattr(train, "train", run)
    assert fails(TINY, capsys) == (INTERRUPTED, "\nInterrupted.\n")
