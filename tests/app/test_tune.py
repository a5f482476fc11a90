"""`tune=`: which values are tried, which is taken, and that the test data have no say in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_lightning.app import tune
from lora_lightning.app.application import main
from lora_lightning.app.build import compared_config
from lora_lightning.app.run import Run
from lora_lightning.app.trial import Tried, shortened
from lora_lightning.app.tune import swept
from lora_lightning.errors import AdapterFileError, UserError

QUICK = ["debug=fast", "trainer.enable_progress_bar=false", "logger=none", "hydra.run.dir=run"]


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def config(**tuning: Any) -> Any:
    tuning = {"points": 3, "factor": 2.0, "most": 9, "fraction": 1.0} | tuning
    return OmegaConf.create({"optim": {"lr": 1e-3}, "lora": {"rank": 2}, "tuning": tuning})


def worth(peak: float, mode: str = "max", tried: list[float] | None = None) -> Any:
    """A score that is best at a value."""

    def of(value: float) -> Tried:
        if tried is not None:
            tried.append(value)
        score = -abs(math.log(value / peak))
        return Tried(score if mode == "max" else -score, "val/acc", mode)

    return of


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(
    ("peak", "best", "values"),
    [
        (1e-3, 1e-3, [5e-4, 1e-3, 2e-3]),
        (4e-3, 4e-3, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]),
        (2.4e-4, 2.5e-4, [5e-4, 1e-3, 2e-3, 2.5e-4, 1.25e-4]),
    ],
)
def test_the_grid_widens_until_the_best_lies_inside(
    peak: float, best: float, values: list[float], mode: str
) -> None:
    tried: list[float] = []
    assert swept(config(), "lr", worth(peak, mode, tried)) == best
    assert tried == values


def test_it_stops_somewhere_and_ranks_are_whole() -> None:
    tried: list[float] = []
    assert swept(config(most=5), "lr", worth(1.0, tried=tried)) == 8e-3
    assert len(tried) == 5
    tried = []
    assert swept(config(points=5), "rank", worth(1, tried=tried)) == 1
    assert tried == [1, 2, 4, 8]  # there is no rank below 1


def test_equal_scores_take_the_configured_value_and_failures_none() -> None:
    assert swept(config(), "lr", lambda v: Tried(0.5, "val/acc", "max")) == 1e-3
    fails = Tried(None, "val/acc", "max", "collapsed")
    assert swept(config(), "lr", lambda v: fails if v > 6e-4 else Tried(0.1, "val/acc", "max")) == 5e-4
    with pytest.raises(UserError, match=r"none of 0.0005, 0.001, 0.002 gives a score \(collapsed\)"):
        swept(config(), "lr", lambda v: fails)


def test_a_trial_of_a_fraction_has_its_schedule_over_that() -> None:
    whole = OmegaConf.create({
        "trainer": {"max_epochs": 20, "max_steps": -1, "check_val_every_n_epoch": 10}
    })  # fmt: skip
    short = shortened(whole, 0.25).trainer
    assert (short.max_epochs, short.check_val_every_n_epoch, short.max_steps) == (5, 5, -1)
    assert whole.trainer.max_epochs == 20


def test_a_run_has_the_rate_that_was_found() -> None:
    main([*QUICK, "method=linear_probe", "tune=lr", "tuning.points=2", "tuning.most=2", "compare=[]"])
    (best,) = [e for e in json.loads(Path("run/tuning.json").read_text()) if e["chosen"]]
    assert f"lr: {best['value']}" in Path("run/config.yaml").read_text()


def test_a_compared_method_trains_at_the_rate_that_was_found(tmp_path: Path, monkeypatch: Any) -> None:
    """With an optimizer whose rates are others than AdamW's."""
    monkeypatch.setattr(tune, "tried", lambda one, folder, what: worth(0.2)(one.optim.lr))
    whole = config(points=3)
    whole.trainer = {"max_epochs": 1, "max_steps": -1, "check_val_every_n_epoch": 1}
    whole.update({
        "method": "full", "compare": ["lora"], "tune": "lr", "run_dir": str(tmp_path),
        "rates": {"full": 1e-3, "lora": 1e-2},
    })  # fmt: skip
    whole.optim = {"rate_scale": 10, "lr": 0.01, "head_lr": None}
    found = tune.tuned(whole, tmp_path, False)
    entries = json.loads((tmp_path / "tuning.json").read_text())
    chosen = {e["method"]: e["value"] for e in entries if e["chosen"]}
    assert chosen == {"full": 0.16, "lora": 0.2}
    assert found.optim.lr == 0.16
    assert compared_config(found, "lora", tmp_path).optim.lr == pytest.approx(0.2)


@pytest.mark.parametrize("text", ["[", "[1]", '[{"method": "lora"}]', "3"])
def test_a_damaged_file_of_trials(text: str, tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text(text)
    with pytest.raises(AdapterFileError, match=r"tuning.json.*Delete it: the trials are then made again"):
        tune.Trials(tmp_path, True)


@pytest.mark.slow
def test_a_comparison_is_done_with_what_was_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[float] = []
    test = Run._test
    monkeypatch.setattr(Run, "_test", lambda run, c: tested.append(run.config.optim.lr) or test(run, c))
    main([*QUICK, "tune=lr", "tuning.points=2", "tuning.most=2", "compare=[lora,linear_probe]"])
    told = capsys.readouterr().out
    entries = json.loads(Path("run/tuning.json").read_text())
    assert [(e["method"], e["value"]) for e in entries] == [
        ("lora", 2e-3), ("lora", 4e-3), ("linear_probe", 0.05), ("linear_probe", 0.1),
    ]  # fmt: skip
    chosen = [e["value"] for e in entries if e["chosen"]]
    best = [max(entries[i : i + 2], key=lambda e: e["score"])["value"] for i in (0, 2)]
    assert chosen == best == tested  # the test data were met by these two alone
    assert told.index("Tuning lr on validation data") < told.index("chosen") < told.index("trainable:")
    assert f"lr: {chosen[0]}" in Path("run/config.yaml").read_text()
    assert not Path("run/tuning").exists() or not list(Path("run/tuning").iterdir())
    with pytest.raises(SystemExit):
        main(["resume=run"])
    assert "the run is finished" in capsys.readouterr().err
    Path("run/results.json").unlink()
    main(["resume=run"])  # nothing is tried again
    assert json.loads(Path("run/tuning.json").read_text()) == entries


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["tune=rate"], "tune=rate: give one or several of lr, rank"),
        (["tune=lr", "method=none"], "tune=lr: method=none trains nothing"),
        (["tune=[lr,rank]", "method=full"], "tune=[lr,rank]: method=full has no rank"),
        (["tune=lr", "tuning.points=1"], "tuning.points=1"),
        (["tuning.fraction=2"], "tuning.fraction=2"),
    ):
        with pytest.raises(SystemExit):
            main([*words, "compare=[]"])
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*QUICK, "tune=lr", "callbacks.checkpoint.monitor=null"])
    assert (
        "callbacks.checkpoint.monitor=null: nothing tells one trial from another" in capsys.readouterr().err
    )
