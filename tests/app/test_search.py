"""`hparams_search=optuna`: the space, the study, what is told; and the sweep of W&B."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lora_lightning.app import cli, search
from lora_lightning.app.application import main
from lora_lightning.app.command_line import CommandLine
from lora_lightning.app.compose import CONF
from lora_lightning.app.trial import Tried

WORDS = ["hparams_search=optuna", "trainer.enable_progress_bar=false"]
optuna = pytest.importorskip("optuna")


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Trials that cost nothing: the nearer the rate to 3e-3, the better."""
    seen: list[dict[str, Any]] = []

    def tried(config: Any, folder: Path, callbacks: Any, what: str) -> Tried:
        seen.append({"lr": config.optim.lr, "rank": config.lora.rank, "epochs": config.trainer.max_epochs})
        return Tried(1 - abs(config.optim.lr - 3e-3), "val/acc", "max")

    monkeypatch.setattr(search, "tried", tried)
    return seen


def test_a_study_is_searched_gone_on_with_and_told(
    proposed: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "search.fraction=0.2", "hydra.run.dir=run"]
    main([*words, "search.trials=6"])
    told = capsys.readouterr().out
    assert len(proposed) == 6 and {p["epochs"] for p in proposed} == {5}
    assert all(1e-4 <= p["lr"] <= 3e-2 and p["rank"] in (4, 8, 16, 32) for p in proposed)
    assert told.count("  trial ") == 6 and "What matters: optim.lr" in told
    assert Path("run/importance.png").read_bytes().startswith(b"\x89PNG")
    best = min(proposed, key=lambda p: abs(p["lr"] - 3e-3))
    line = told.splitlines()[-1]
    assert line.startswith("The best: lora-lightning train ") and "search" not in line
    CommandLine(line.removeprefix("The best: lora-lightning train ").split()).check()
    assert f"optim.lr={best['lr']}" in line
    main([*words, "search.trials=8"])  # two more
    assert len(proposed) == 8
    main([*words, "search.trials=8"])
    assert len(proposed) == 8
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, "search.space.lora.rank=[2,4]"])
    assert "search.study=vit_digits: was begun in" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # scores of other data say nothing of these
        main([*words, "search.trials=9", "data.domain=source"])
    assert "with another data:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "search.trials=9", "search.fraction=0.4"])
    assert "with another search.fraction:" in capsys.readouterr().err
    assert len(proposed) == 8


def test_trials_of_processes_that_have_gone_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    for process in (search._this_process(), [search._this_process()[0], 2**22 + 1], ["elsewhere", 1]):
        study.ask().set_user_attr(search.PROCESS, process)
    study.tell(study.ask(), 1.0)
    assert search._counted(study) == 3  # of the four not that of the process that there is not


def test_a_trial_is_pruned_in_its_validation() -> None:
    reported: list[tuple[float, int]] = []
    trial = SimpleNamespace(
        report=lambda value, step: reported.append((value, step)), should_prune=lambda: len(reported) == 2
    )
    pruning = search.Pruning(trial, "val/acc")
    trainer: Any = SimpleNamespace(sanity_checking=True, callback_metrics={"val/acc": 0.5}, current_epoch=0)
    module: Any = None
    pruning.on_validation_end(trainer, module)
    assert not reported
    trainer.sanity_checking = False
    pruning.on_validation_end(trainer, module)
    trainer.callback_metrics, trainer.current_epoch = {"val/acc": 0.25}, 1
    with pytest.raises(optuna.TrialPruned):
        pruning.on_validation_end(trainer, module)
    assert reported == [(0.5, 0), (0.25, 1)]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("+search.space.lora.rnk=[4,8]", "search.space: lora.rnk"),
        ("search.space.lora.rank=[4,0]", "search.space: lora.rank=0"),
        ("search.space.optim.lr={low:-1,high:1,log:false}", "search.space: optim.lr=-1"),
        ("search.space.optim.lr.high=1e-5", "give numbers, low below high"),
        (
            "search.space.lora.dropout=0.1",
            "search.space.lora.dropout=0.1: give a list of choices, or a range",
        ),
        ("search.trials=0", "search.trials=0"),
        ("method=none", "method=none"),
        ("trainer=ddp_sim", "start it in several shells"),
    ],
)
def test_mistakes(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*WORDS, word])
    assert told in capsys.readouterr().err


def test_without_optuna(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lightning.app.search_space.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(WORDS)
    told = capsys.readouterr().err.strip()
    assert told.endswith("Optuna is not installed: pip install 'lora-lightning[tune]'")


@pytest.mark.slow
def test_a_search_that_trains(capsys: pytest.CaptureFixture[str]) -> None:
    main([*WORDS, "data.train_size=32", "trainer.max_epochs=2", "search.trials=2", "hydra.run.dir=run"])
    assert capsys.readouterr().out.count("val/acc 0.") == 2
    assert not list(Path("run").glob("trial_*"))


def test_the_sweep_of_wandb_is_of_options_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["copy", "wandb_sweep", "mine.yaml"])
    assert "wandb sweep mine.yaml" in capsys.readouterr().out
    assert Path("mine.yaml").read_text() == (CONF / "wandb_sweep.yaml").read_text()
    sweep = yaml.safe_load(Path("mine.yaml").read_text())
    program, train, *words = sweep["command"]
    assert (program, train, words.pop()) == ("lora-lightning", "train", "${args_no_hyphens}")
    parameters = sweep["parameters"].items()
    values = {n: p.get("values") or [p["min"], p["max"]] for n, p in parameters}
    for i in range(max(map(len, values.values()))):
        CommandLine([*words, *(f"{n}={json.dumps(v[i % len(v)])}" for n, v in values.items())]).check()
