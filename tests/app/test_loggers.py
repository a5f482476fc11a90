"""Experiment loggers: W&B with and without a key, and what is found in the run's own file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from wandb_file import StoredRun, read_wandb

from lora_lightning.app import logged, loggers
from lora_lightning.app.application import main
from lora_lightning.app.command_line import command_config
from lora_lightning.app.compose import CONF, RECIPES
from lora_lightning.app.console import short_path
from lora_lightning.app.logged import log_end
from lora_lightning.app.loggers import Loggers, build_loggers, finish, give_ids, log_start
from lora_lightning.app.loggers_wandb import wandb_logger
from lora_lightning.app.prepare import Prepared
from lora_lightning.app.run_names import RunName, differing
from lora_lightning.files.fingerprint import short
from lora_lightning.trainer.trackers.choice import tracker_of
from lora_lightning.trainer.trackers.csv import CSVTracker
from lora_lightning.utils.wandb_key import has_wandb_key

DEFAULT_HOST = urlparse(wandb.Settings.model_fields["base_url"].default).netloc  # wandb's own
NAME = RunName(["recipe", "lora"], 1, None, [])
TINY = ["debug=fast", "compare=[]", "trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    monkeypatch.chdir(tmp_path)


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def test_an_offline_run_carries_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["debug=fast", "trainer.enable_progress_bar=false", "compare=[none,linear_probe]"]
    main([*words, "logger=wandb", "tags=[first,tuned]", "lora.rank=3", "hydra.run.dir=run"])
    out = capsys.readouterr().out
    folder = only(tmp_path, "run/wandb/offline-run-*")
    assert f"W&B runs offline (there is no key). To upload: wandb sync {short_path(folder)}" in out
    run = read_wandb(only(folder, "*.wandb"))
    assert run.exit == 0
    names_of(run)
    configuration_of(run, tmp_path)
    curves_of(run)
    tables_of(run, folder / "files")
    examples_of(run)
    adapter_of(run, tmp_path / "run")
    summary_of(run, tmp_path / "run")
    nothing_else_of(run)
    beside = read_wandb(only(tmp_path, "run/linear_probe/wandb/offline-run-*/*.wandb"))
    the_method_beside(beside, run)
    assert (tmp_path / "run" / "csv" / "metrics.csv").is_file(), "of which the page is made"


def names_of(run: StoredRun) -> None:
    about = {"project": "lora_lightning", "group": "vit_digits run", "job_type": "lora"}
    assert about.items() <= run.about.items()
    assert run.about["name"] == "vit_digits lora debug=fast rank=3"
    assert sorted(set(run.tags)) == ["digits", "first", "lora", "tuned", "vit_digits"]


def configuration_of(run: StoredRun, tmp_path: Path) -> None:
    assert run.config["lora"]["rank"] == 3
    assert run.config["data"]["seed"] == 0  # `${seed}` in the file, resolved here
    assert run.config["run_dir"] == str(tmp_path / "run")
    counts, callback = run.config["parameters"], run.config["LoRACallback"]
    assert 0 < counts["trainable"] < counts["total"]
    assert callback["rank"] == 3 and callback["trainable_parameters"] == counts["trainable"]


def curves_of(run: StoredRun) -> None:
    last = run.last()
    assert 0 <= last["val/acc"] <= 1 and 0 <= last["test/acc"] <= 1 and last["train/loss"] > 0
    assert any(name.startswith("lr-") for name in last)
    assert run.curve("lora/grad_norm")[0] > 0
    assert run.curve("lora/update_norm")[-1] > 0
    assert 1 <= last["lora/effective_rank"] <= 3
    each = [name for name in last if name.startswith("lora/effective_rank/")]
    assert len(each) == 17 and "lora/effective_rank/*" in run.hidden, "a chart of each by itself is too many"


def stored(run: StoredRun, files: Path, name: str) -> dict[str, Any]:
    return json.loads((files / run.last()[f"{name}/path"]).read_text())


def tables_of(run: StoredRun, files: Path) -> None:
    plan = stored(run, files, "plan")
    assert plan["columns"] == ["layer", "kind", "weight", "rank", "alpha", "parameters"]
    assert {row[3] for row in plan["data"]} == {3}
    assert len(stored(run, files, "spectra")["data"]) == len(plan["data"])
    results = stored(run, files, "results")
    assert [row[0] for row in results["data"]] == ["before adaptation", "linear probe", "LoRA"]
    shown = stored(run, files, "per_class")
    assert [row[0] for row in shown["data"]] == list("0123456789")
    tested = sum(row[1] for row in shown["data"])
    confusion = next(k for k in run.last() if k.startswith("test/confusion") and k.endswith("/path"))
    cells = json.loads((files / run.last()[confusion]).read_text())["data"]
    right = sum(row[2] for row in cells if row[0] == row[1])
    assert len(cells) == 100 and right / tested == pytest.approx(run.last()["test/acc"])


def examples_of(run: StoredRun) -> None:
    """As W&B stores tables with pictures: the table and they are files of an artifact."""
    (files,) = (a["files"] for a in run.artifacts if "test/examples.table.json" in a["files"])
    examples = json.loads(Path(files["test/examples.table.json"]).read_text())
    assert examples["columns"] == ["name", "picture", "truth", "before", "after"]
    assert len(examples["data"]) == 8
    pictures = [Image.open(files[row[1]["path"]]) for row in examples["data"]]
    assert {picture.size for picture in pictures} == {(256, 256)}
    assert any(row[3] != row[4] for row in examples["data"])


def adapter_of(run: StoredRun, folder: Path) -> None:
    """The very adapter, and the base that it came from as an input of the run."""
    (adapter,) = (a for a in run.artifacts if a["type"] == "model")
    assert adapter["name"] == f"adapter-{run.about['id']}" and not adapter["used"]
    assert adapter["aliases"] >= {"best", "last"}, "of one epoch"
    about = json.loads(Path(adapter["files"]["adapter_config.json"]).read_text())
    kept = load_file(adapter["files"]["adapter_model.safetensors"])
    own = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert kept.keys() == own.keys() and all((kept[name] == own[name]).all() for name in own)
    (base,) = (a for a in run.artifacts if a["used"])
    assert base["metadata"]["fingerprint"] == short(about["fingerprint"])
    assert list(base["files"]) == ["base.json"], "no weights of the base"


def summary_of(run: StoredRun, folder: Path) -> None:
    for result in json.loads((folder / "results.json").read_text()):
        place = "final" if result["method"] == "lora" else f"final/{result['method']}"
        bounds = [run.summary[f"{place}/acc_{end}"] for end in ("low", "high")]
        assert run.summary[f"{place}/acc"] == pytest.approx(result["scores"]["acc"])
        assert bounds == pytest.approx(result["intervals"]["acc"])
        assert run.summary[f"{place}/trained_parameters"] == result["trained"]


def nothing_else_of(run: StoredRun) -> None:
    """No machine's name, command line, packages, code, screen."""
    assert run.about["host"] == "-" and not run.environment and "output_raw" not in run.kinds
    assert all(file.startswith("media/") for file in run.files)
    assert {a["type"] for a in run.artifacts} == {"run_table", "base-model", "model"}


def the_method_beside(run: StoredRun, of: StoredRun) -> None:
    assert run.about["name"] == "vit_digits linear_probe debug=fast rank=3"
    assert run.about["group"] == of.about["group"] and run.about["id"] != of.about["id"]
    assert run.about["job_type"] == "linear_probe" and "lora" not in run.tags
    assert run.curve("val/acc") and run.curve("train/loss")
    assert run.summary["final/acc"] == of.summary["final/linear_probe/acc"]
    assert run.config["method"] == "linear_probe" and run.exit == 0


def test_what_may_not_go_there_does_not(tmp_path: Path) -> None:
    run = loggers_of("logger=wandb", "logger.wandb.examples=0", "logger.wandb.adapter=false")["wandb"]
    allowed = tracker_of(run).allowed
    assert (allowed.examples, allowed.adapter) == (0, False)
    settings = run._wandb_init["settings"]  # type: ignore[attr-defined]
    assert (settings.console, settings.host, settings.disable_git, settings.disable_code) == (
        "off", "-", True, True,
    )  # fmt: skip
    asked = [f"logger.wandb.{name}=true" for name in ("console", "git", "code")]
    settings = loggers_of("logger=wandb", *asked)["wandb"]._wandb_init["settings"]  # type: ignore[attr-defined]
    assert settings.console != "off" and settings.host != "-" and not settings.x_disable_meta
    assert not settings.disable_git and settings.save_code


def loggers_of(*words: str, name: RunName = NAME) -> Loggers:
    return build_loggers(OmegaConf.create(command_config(["run_dir=run", *words])), name)


def test_a_name_says_in_what_a_run_differs() -> None:
    given = ["recipe=vit_digits", "logger=wandb", "lora.rank=16", "+optim.lr=1e-3", "schedule.lr=2", "seed=1"]
    given += ["data.root=/home/me/pictures", "model.checkpoint=base.pt", "logger.wandb.project=p", "tags=[a]"]
    assert differing(given) == ["rank=16", "optim.lr=1e-3", "schedule.lr=2", "seed=1", "checkpoint=base.pt"]
    name = RunName(["r", "lora", *["x=1"] * 60], 1, None, ["r", "lora"])
    assert len(name.text) == 128
    assert name.of_method("full").text.startswith("r full x=1")
    assert name.of_method("full").tags == ["r", "full"]


def test_a_name_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["logger.wandb.name=mine", "logger.wandb.group=ours", "logger.wandb.tags=[a]"]
    name = RunName(["recipe", "lora"], 1, "theirs", ["recipe"])
    made = loggers_of("logger=wandb", *own, name=name)["wandb"]._wandb_init  # type: ignore[attr-defined]
    assert (made["name"], made["group"], made["tags"]) == ("mine", "ours", ["recipe", "a"])
    monkeypatch.setenv("WANDB_NAME", "from outside")
    made = loggers_of("logger=wandb", name=name)["wandb"]._wandb_init  # type: ignore[attr-defined]
    assert (made["name"], made["group"]) == (None, "theirs"), "W&B reads its variable itself"


def test_a_run_goes_on_in_its_trackers(tmp_path: Path) -> None:
    config = OmegaConf.create({"logger": {"wandb": {"id": None}, "mlflow": {"id": "given"}, "csv": {}}})
    give_ids(config, tmp_path)
    assert config.logger.wandb.id is None
    kept = {"wandb": "abc", "mlflow": "other", "csv": "x"}
    (tmp_path / "trackers.json").write_text(json.dumps(kept))
    give_ids(config, tmp_path)
    assert (config.logger.wandb.id, config.logger.mlflow.id, config.logger.csv) == ("abc", "given", {})
    (tmp_path / "trackers.json").write_text('{"wandb": "../x"}')
    config.logger.wandb.id = None
    give_ids(config, tmp_path)
    assert config.logger.wandb.id is None, "no id"


def test_a_sweep_makes_one_run_a_job(tmp_path: Path) -> None:
    main(["-m", *TINY, "logger=wandb", "lora.rank=2,4", "hydra.sweep.dir=sweep"])
    ranks = []
    for job in ("0", "1"):
        found = read_wandb(only(tmp_path, f"sweep/{job}/wandb/offline-run-*/*.wandb"))
        ranks.append(found.config["lora"]["rank"])
        assert found.exit == 0
        assert found.about["group"] == "vit_digits sweep"
        assert found.about["name"].endswith(f"rank={ranks[-1]}")
    assert ranks == [2, 4]


@pytest.mark.slow
def test_a_run_of_wandbs_sweep_is_one_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As an agent starts it; what it is compared with stays on the disk."""
    sweep = yaml.safe_load((CONF / "wandb_sweep.yaml").read_text())
    parameters = sweep["parameters"].items()
    given = [f"{name}={values.get('values', [values.get('min')])[0]}" for name, values in parameters]
    words = [word for word in sweep["command"][2:] if not word.startswith(("$", "compare"))]
    monkeypatch.setenv("WANDB_SWEEP_ID", "swept")
    monkeypatch.setenv("WANDB_RUN_ID", "first")
    main([*words, *TINY[::2], *given, "compare=[linear_probe]", "hydra.run.dir=run"])
    run = read_wandb(only(tmp_path, "run/wandb/offline-run-*/*.wandb"))
    assert (run.about["id"], run.about["group"]) == ("first", "")
    assert run.config["lora"]["rank"] == 4 and run.config["optim"]["lr"] == 1e-4
    assert sweep["metric"]["name"] in run.last()
    assert not (tmp_path / "run" / "linear_probe" / "wandb").exists()
    assert (tmp_path / "run" / "linear_probe" / "csv" / "metrics.csv").is_file()


def test_the_adapters_of_the_best_and_of_the_last_epoch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best, last = tmp_path / "adapter", tmp_path / "checkpoints" / "last.ckpt"
    assert logged._epochs(tmp_path, "lora") == [(best, ["best"])]
    last.parent.mkdir()
    last.touch()
    found = {best: torch.ones(2), last: torch.zeros(2)}
    monkeypatch.setattr(
        logged, "read_source", lambda path: SimpleNamespace(saved=SimpleNamespace(tensors={"a": found[path]}))
    )
    assert logged._epochs(tmp_path, "lora") == [(last, ["last"]), (best, ["best"])]
    assert logged._epochs(tmp_path, "peft") == [(best, ["best"])]
    found[last] = torch.ones(2)
    assert logged._epochs(tmp_path, "lora") == [(best, ["best", "last"])]


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_at_the_end_keeps_nobody_from_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad, good = CSVLogger(tmp_path, "bad", ""), CSVLogger(tmp_path, "good", "")
    monkeypatch.setattr(bad, "finalize", full)
    monkeypatch.setattr(CSVTracker, "summary", lambda self, values: full() if self.logger is bad else None)
    told: list[Any] = []
    monkeypatch.setattr(CSVTracker, "table", lambda self, name, *_: told.append((self.logger, name)))
    monkeypatch.setattr(good, "finalize", lambda status: told.append((good, status)))
    run = SimpleNamespace(
        task=SimpleNamespace(scores=()), method="lora", config=OmegaConf.create({"run_dir": str(tmp_path)})
    )
    both = Loggers(bad=bad, good=good)
    with pytest.warns(UserWarning, match=r"CSVLogger could not take how the run ended \(OSError: .*No space"):
        log_end(both, run, [])  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="could not take the end of the run"):
        finish(both)
    assert told == [(bad, "results"), (good, "results"), (good, "success")]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["app.logged.log_adapter", "trainer.trackers.wandb.WandbTracker.summary"])
def test_a_run_outlives_a_tracker_that_fails_when_it_has_trained(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(f"lora_lightning.{where}", full)
    with pytest.warns(UserWarning, match="WandbLogger could not take"):
        main([*TINY, "logger=wandb", "hydra.run.dir=run"])
    assert (tmp_path / "run" / "results.json").is_file() and (tmp_path / "run" / "report.html").is_file()
    assert read_wandb(only(tmp_path, "run/wandb/offline-run-*/*.wandb")).exit == 0


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
    log_start(Loggers(csv=logger), {"lora": {"rank": 4}}, Prepared(trained=25, total=100))
    saved = yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text())
    assert saved == {"lora": {"rank": 4}, "parameters": {"trainable": 25, "total": 100, "percent": 25.0}}


def test_no_logger_at_all() -> None:
    assert build_loggers(OmegaConf.create({"logger": None}), NAME) == {}
    assert build_loggers(OmegaConf.create({"logger": {"csv": None}}), NAME) == {}


def test_a_path_is_shown_the_short_way(tmp_path: Path) -> None:
    assert short_path(tmp_path / "outputs" / "a") == "outputs/a"
    assert short_path("/etc") == "/etc"


@pytest.mark.parametrize(
    ("environment", "words", "chosen"),
    [
        ({}, [], "csv"),
        ({"WANDB_API_KEY": "k" * 40}, [], "csv wandb"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, [], "csv wandb"),
        ({"WANDB_MODE": "offline"}, [], "csv wandb"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "k" * 40}, [], "csv"),
        ({}, ["logger.wandb.offline=true"], "csv wandb"),
        ({}, ["logger.choose=false"], "csv wandb"),
    ],
)
def test_the_logger_that_can_work_is_chosen(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: list[str], chosen: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loggers, "instantiate", lambda node, **_: node["_target_"].rpartition(".")[2])
    config = OmegaConf.create(command_config(["run_dir=run", "logger=auto", *words]))
    assert " ".join(build_loggers(config, NAME)) == chosen
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
