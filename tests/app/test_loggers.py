"""Experiment loggers: W&B with and without a key, and what is found in the run's own file."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from lora_lightning.app import loggers
from lora_lightning.app.application import main
from lora_lightning.app.command_line import command_config
from lora_lightning.app.compose import RECIPES
from lora_lightning.app.console import short_path
from lora_lightning.app.loggers import build_loggers, has_wandb_key, log_start, wandb_logger

DEFAULT_HOST = urlparse(wandb.Settings.model_fields["base_url"].default).netloc  # wandb's own
TINY = ["debug=fast", "compare=[]", "trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB, each piece with its
    checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, at, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum
        record, at = record + piece, at + 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(file: Path) -> dict[str, Any]:
    """What a run's own file holds, read by W&B's own messages: config, tags, history, exit code."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"config": {}, "history": [], "tags": [], "exit": None}
    for data in wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["tags"] += list(record.run.tags)
            found["project"] = record.run.project
            items = list(record.run.config.update)
        elif kind == "config":
            items = list(record.config.update)
        elif kind == "history":
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found["history"].append(row)
            continue
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
            continue
        else:
            continue
        for item in items:
            found["config"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def test_an_offline_run_carries_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "logger=wandb", "tags=[first,tuned]", "lora.rank=3", "hydra.run.dir=run"])
    out = capsys.readouterr().out
    folder = only(tmp_path, "run/wandb/offline-run-*")
    assert f"W&B runs offline (there is no key). To upload: wandb sync {short_path(folder)}" in out
    found = read_wandb(only(folder, "*.wandb"))
    assert sorted(set(found["tags"])) == ["first", "tuned"]
    assert found["project"] == "lora_lightning"
    assert found["exit"] == 0
    config = found["config"]
    assert config["lora"]["rank"] == 3
    assert config["data"]["seed"] == 0  # `${seed}` in the file, resolved here
    assert config["run_dir"] == str(tmp_path / "run")
    counts = config["parameters"]
    assert 0 < counts["trainable"] < counts["total"]
    history: dict[str, Any] = {}
    for row in found["history"]:
        history.update(row)
    assert 0 <= history["val/acc"] <= 1
    assert 0 <= history["test/acc"] <= 1
    assert history["train/loss"] > 0
    rates = [v for k, v in history.items() if k.startswith("lr-")]
    assert rates
    assert all(isinstance(rate, float) for rate in rates)
    assert history["plan/_type"] == "table-file"
    table = json.loads((folder / "files" / history["plan/path"]).read_text())
    assert table["columns"] == ["layer", "kind", "weight", "rank", "alpha", "parameters"]
    assert {row[3] for row in table["data"]} == {3}
    assert sum(row[5] for row in table["data"]) < counts["trainable"]  # the head trains too
    of_the_test_in_wandb(folder / "files", history)


def of_the_test_in_wandb(files: Path, history: dict[str, Any]) -> None:
    """Classes, confusions and pictures of the test, read back from the run's own files."""
    shown = json.loads((files / history["per_class/path"]).read_text())
    assert shown["columns"][:5] == ["class", "pictures", "precision", "recall", "f1"]
    assert [row[0] for row in shown["data"]] == list("0123456789")
    tested = sum(row[1] for row in shown["data"])
    confusion = next(k for k in history if k.startswith("test/confusion") and k.endswith("/path"))
    cells = json.loads((files / history[confusion]).read_text())["data"]
    assert len(cells) == 100
    assert sum(row[2] for row in cells) == tested
    right = sum(row[2] for row in cells if row[0] == row[1])
    assert right / tested == pytest.approx(history["test/acc"])
    names, captions = history["test/mistakes/filenames"], history["test/mistakes/captions"]
    assert len(names) == len(captions) == min(16, tested - right)
    assert all((files / name).is_file() for name in names)
    assert all(re.fullmatch(r"test digit \d+: \d, predicted \d 0\.\d\d", c) for c in captions)


def test_a_sweep_makes_one_run_a_job(tmp_path: Path) -> None:
    main(["-m", *TINY, "logger=wandb", "lora.rank=2,4", "hydra.sweep.dir=sweep"])
    ranks = []
    for job in ("0", "1"):
        found = read_wandb(only(tmp_path, f"sweep/{job}/wandb/offline-run-*/*.wandb"))
        ranks.append(found["config"]["lora"]["rank"])
        assert found["exit"] == 0
    assert ranks == [2, 4]


def test_the_key_is_found_where_wandb_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine example.org login user password x\n")
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    assert has_wandb_key()
    (tmp_path / "netrc").write_text(f"machine {DEFAULT_HOST} login user password {'k' * 40}\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    (tmp_path / "netrc").write_text(f"machine wandb.example.org:8080 login user password {'k' * 40}\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example.org")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert has_wandb_key()


@pytest.mark.parametrize(
    ("mode", "key", "offline", "expected"),
    [
        (None, False, None, "offline"),
        (None, True, None, "online"),
        (None, True, True, "offline"),
        ("offline", True, None, "offline"),
        ("disabled", False, None, "disabled"),
    ],
)
def test_the_mode(
    monkeypatch: pytest.MonkeyPatch, mode: str | None, key: bool, offline: bool | None, expected: str
) -> None:
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_logger(offline=offline)._wandb_init["mode"] == expected


def test_every_logger_gets_plain_hyperparameters(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="")
    log_start([logger], {"lora": {"rank": 4}}, trainable=25, total=100, plan=None)
    saved = yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text())
    assert saved == {"lora": {"rank": 4}, "parameters": {"trainable": 25, "total": 100, "percent": 25.0}}


def test_no_logger_at_all() -> None:
    assert build_loggers(OmegaConf.create({"logger": None})) == []
    assert build_loggers(OmegaConf.create({"logger": {"csv": None}})) == []


def test_a_path_is_shown_the_short_way(tmp_path: Path) -> None:
    assert short_path(tmp_path / "outputs" / "a") == "outputs/a"
    assert short_path("/etc") == "/etc"


@pytest.mark.parametrize(
    ("environment", "words", "chosen"),
    [
        ({}, [], "csv"),
        ({"WANDB_API_KEY": "k" * 40}, [], "wandb"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, [], "wandb"),
        ({"WANDB_MODE": "offline"}, [], "wandb"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "k" * 40}, [], "csv"),
        ({}, ["logger.wandb.offline=true"], "wandb"),
        ({"WANDB_API_KEY": "k" * 40}, ["logger.choose=false"], "csv wandb"),
    ],
)
def test_the_logger_that_can_work_is_chosen(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: list[str], chosen: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loggers, "instantiate", lambda node, **_: node["_target_"].rpartition(".")[2])
    config = OmegaConf.create(command_config(["logger=auto", *words]))
    names = {"CSVLogger": "csv", "wandb_logger": "wandb"}
    assert " ".join(names[made] for made in build_loggers(config)) == chosen
    said = loggers.chosen_in_words(config)
    assert bool(said) == (chosen == "csv")
    assert not said or ("WANDB_MODE=disabled" if "WANDB_MODE" in environment else "no key here") in said


def test_no_recipe_asks_for_an_account() -> None:
    """Those that can use W&B leave the choice to what is there."""
    used = {path.stem: yaml.safe_load(path.read_text())["defaults"] for path in RECIPES.glob("recipe/*.yaml")}
    loggers_of = {
        name: [d["override /logger"] for d in ds if "override /logger" in d] for name, ds in used.items()
    }
    assert loggers_of["vit_cifar"] == ["auto"]
    assert not any("wandb" in chosen for chosen in loggers_of.values())


@pytest.mark.slow
def test_a_run_without_a_key_says_where_its_metrics_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*TINY, "logger=auto", "hydra.run.dir=run"])
    assert "Metrics go to run/csv: W&B has no key here" in capsys.readouterr().out
    assert (tmp_path / "run" / "csv" / "metrics.csv").is_file()
    assert not (tmp_path / "run" / "wandb").exists()
