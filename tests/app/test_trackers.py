"""MLflow, TensorBoard, Comet and Aim by one word, each read back by its own reader; those that are not
installed are skipped by name."""

from __future__ import annotations

import json
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lora_lightning.app import logger_packages
from lora_lightning.app.application import main
from lora_lightning.app.command_line import command_config
from lora_lightning.errors import ConfigError

WORDS = ["debug=fast", "trainer.enable_progress_bar=false", "compare=[linear_probe]", "lora.rank=3"]
CURVES = {"val/acc", "train/loss", "lora/grad_norm", "lora/update_norm", "lora/effective_rank", "test/acc"}
NUMBERS = {"final/acc", "final/acc_low", "final/acc_high", "final/linear_probe/acc"}
NAME, BESIDE = "vit_digits lora debug=fast rank=3", "vit_digits linear_probe debug=fast rank=3"


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "COMET_API_KEY", "AIM_REPO"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def accuracies(folder: Path) -> dict[str, float]:
    return {r["method"]: r["scores"]["acc"] for r in json.loads((folder / "results.json").read_text())}


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main([*WORDS, "logger=tensorboard", "hydra.run.dir=run"])
    run = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    beside = EventAccumulator(str(tmp_path / "run" / "linear_probe" / "tensorboard")).Reload()
    tags = run.Tags()
    assert set(tags["scalars"]) >= CURVES | NUMBERS
    assert {f"{name}/text_summary" for name in ("plan", "spectra", "results", "per_class")} <= set(
        tags["tensors"]
    )
    assert "test/examples/words/text_summary" in tags["tensors"]
    shown = [name for name in tags["images"] if name.startswith("test/examples/picture")]
    (grid,) = (run.Images(name)[0] for name in shown)
    assert grid.width * grid.height == 8 * 256 * 256
    found = accuracies(tmp_path / "run")
    assert run.Scalars("final/acc")[-1].value == pytest.approx(found["lora"])
    assert run.Scalars("hp_metric")[-1].value == pytest.approx(found["lora"])
    assert beside.Scalars("final/acc")[-1].value == pytest.approx(found["linear_probe"])
    assert beside.Scalars("val/acc") and beside.Scalars("train/loss")


@pytest.mark.slow
def test_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    main([*WORDS, "logger=mlflow", "tags=[first]", "hydra.run.dir=run"])
    assert "MLflow: sqlite:///mlflow.db. To see it: mlflow ui" in capsys.readouterr().out
    client = MlflowClient("sqlite:///mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "lora_lightning")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    run, beside = runs.pop(NAME), runs.pop(BESIDE)
    assert not runs and run.info.status == beside.info.status == "FINISHED"
    assert beside.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert run.data.tags["group"] == beside.data.tags["group"] == "vit_digits run"
    assert run.data.tags["tags"] == "vit_digits, lora, digits, first"
    assert {run.data.tags[name] for name in ("mlflow.user", "mlflow.source.name")} == {"-"}
    assert run.data.params["lora/rank"] == run.data.params["LoRACallback/rank"] == "3"
    found = accuracies(tmp_path / "run")
    assert run.data.metrics.keys() >= CURVES | NUMBERS
    assert run.data.metrics["final/acc"] == pytest.approx(found["lora"])
    assert beside.data.metrics["final/acc"] == pytest.approx(found["linear_probe"])
    stored = Path(client.download_artifacts(run.info.run_id, ""))
    tables = {file.stem for file in (stored / "tables").iterdir()}
    assert tables >= {"plan", "spectra", "results", "per_class", "test_confusion", "test_examples"}
    plan = json.loads((stored / "tables" / "plan.json").read_text())
    assert plan["columns"][0] == "layer" and {row[3] for row in plan["data"]} == {3}
    assert len(list((stored / "test_examples").glob("*_picture.png"))) == 8
    for alias in ("best", "last"):
        names = {file.name for file in (stored / "adapter" / alias).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "about.json"}
    ids = json.loads((tmp_path / "run" / "trackers.json").read_text())
    assert ids == {"mlflow": run.info.run_id}
    main(["resume=run", "trainer.max_epochs=2", "compare=[]"])
    again = client.get_run(run.info.run_id)
    assert len(client.get_metric_history(again.info.run_id, "val/acc")) == 2
    assert len(client.search_runs([experiment.experiment_id])) == 2


@pytest.mark.slow
def test_comet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("comet_ml")
    main([*WORDS, "logger=comet", "tags=[first]", "hydra.run.dir=run"])
    (archive,) = (tmp_path / "run" / "comet").glob("*.zip")
    assert f"comet upload {archive.parent}/{archive.name[:32]}*.zip" in capsys.readouterr().out
    with zipfile.ZipFile(archive) as stored:
        lines = [json.loads(line) for line in stored.read("messages.json").decode().splitlines()]
        about = json.loads(stored.read("experiment.json"))
        files = set(stored.namelist())
    told: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        told.setdefault(line["type"], []).append(line["payload"])
    assert {"vit_digits", "lora", "first"} <= set(about["tags"])
    metrics = {row["metric"]["metricName"] for row in told["metric_msg"]}
    assert metrics >= CURVES | NUMBERS
    assert {"linear_probe_val/acc", "linear_probe_train/loss"} <= metrics
    assert len(files) > 8
    whole = json.dumps(lines)
    for word in (
        "plan.csv",
        "results.csv",
        "test_confusion.json",
        "adapter_model.safetensors",
        '"best"',
        NAME,
    ):
        assert word in whole, word
    assert "git_meta" not in whole


@pytest.mark.slow
def test_aim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("aim")
    from aim import Repo, Run

    main([*WORDS, "logger=aim", "tags=[first]", "hydra.run.dir=run"])
    assert "To see it: aim up --repo" in capsys.readouterr().out
    repo = Repo(str(tmp_path))
    options = {"repo": repo, "force_resume": True, "system_tracking_interval": None}
    opened = [Run(found, **options) for found in repo.list_all_runs()]  # read_only waits for `aim up`'s index
    runs = {run.name: run for run in opened}
    run, beside = runs[NAME], runs[BESIDE]
    metrics = {metric.name for metric in run.metrics()}
    assert metrics >= CURVES
    assert {"val/acc", "train/loss"} <= {metric.name for metric in beside.metrics()}
    assert {"vit_digits", "lora", "first", "vit_digits run"} <= set(run.tags)
    found = accuracies(tmp_path / "run")
    assert run["final"]["final/acc"] == pytest.approx(found["lora"])
    assert run["hparams", "lora", "rank"] == 3 == run["hparams", "LoRACallback", "rank"]
    texts = {one["name"] for one in run.collect_sequence_info("texts")["texts"]}
    assert texts >= {"plan", "spectra", "results", "test/confusion"}
    images = {one["name"] for one in run.collect_sequence_info("images")["images"]}
    assert images == {"test/examples"}
    assert run.get("__system_params") is None, "no environment variables"


@pytest.mark.parametrize("name", ["mlflow", "comet", "aim", "wandb"])
def test_a_missing_package_is_told_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger_packages, "find_spec", lambda module: None)
    package = {"comet": "comet-ml"}.get(name, name)
    wanted = rf"logger={name}: needs {package}, which is not installed: pip install {package}"
    with pytest.raises(ConfigError, match=wanted):
        command_config([f"logger={name}"])


def test_a_tracker_that_there_is_no_more() -> None:
    with pytest.raises(
        ConfigError, match=r"logger=neptune: Neptune ended its service.*: give one of aim, auto"
    ):
        command_config(["logger=neptune"])


@pytest.mark.parametrize(("name", "module"), [("mlflow", "mlflow"), ("comet", "comet_ml"), ("aim", "aim")])
def test_options_are_checked(name: str, module: str) -> None:
    told = [f"logger.{name}.examples=-1: give a whole number of at least 0", f"logger.{name}.tag"]
    with pytest.raises(ConfigError) as error:
        command_config([f"logger={name}", f"logger.{name}.examples=-1", f"+logger.{name}.tag=x"])
    assert all(any(line.startswith(begin) for line in error.value.problems) for begin in told)
    assert find_spec(module) or any("pip install" in line for line in error.value.problems)
