"""What callbacks watch: the task's first score by itself, a name that it logs, and no other."""

from types import SimpleNamespace

import pytest

from lora_lightning.app.application import main
from lora_lightning.app.monitors import watching
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.scores import Score

REGRESSION = SimpleNamespace(scores=(Score("mae", "MAE", best="min"), Score("r2", "R²")))


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ({"monitor": "auto", "mode": None}, {"monitor": "val/mae", "mode": "min"}),
        ({"monitor": "auto", "mode": "max"}, {"monitor": "val/mae", "mode": "max"}),
        ({"monitor": "val/r2", "mode": None}, {"monitor": "val/r2", "mode": "max"}),
        ({"monitor": "val/loss", "mode": None}, {"monitor": "val/loss", "mode": "min"}),
        ({"monitor": None, "mode": None}, {"monitor": None, "mode": "max"}),
        ({"monitor": "auto"}, {"monitor": "val/mae"}),
        ({"logging_interval": "step"}, {"logging_interval": "step"}),
    ],
)
def test_what_is_left_open_is_filled_in(given, filled):
    assert watching({"one": given, "none": None}, REGRESSION) == [filled]


def test_a_score_that_the_task_does_not_log_is_refused_by_name():
    task = SimpleNamespace(scores=REGRESSION.scores, monitors=("mae", "r2", "loss"))
    with pytest.raises(ConfigError) as caught:
        watching({"stop": {"monitor": "val/acc", "mode": "max"}, "best": {"monitor": "val/mea"}}, task)
    first, second = caught.value.problems
    assert first.startswith("callbacks.stop.monitor=val/acc: of these data SimpleNamespace does not log it.")
    assert first.endswith("Give one of val/mae, val/r2, val/loss; auto is val/mae.")
    assert "Did you mean 'val/mae'" in second
    assert watching({"loss": {"monitor": "train/loss", "mode": "min"}}, task)
    with pytest.raises(ConfigError, match=r"callbacks\.one\.mode=null: give min or max"):
        watching({"one": {"monitor": "val/odd", "mode": None}}, REGRESSION)


def test_a_run_ends_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["debug=fast", "compare=[]", "hydra.run.dir=run", "callbacks.checkpoint.monitor=val/acu"]
    with pytest.raises(SystemExit):
        main(words)
    out, err = capsys.readouterr()
    assert "callbacks.checkpoint.monitor=val/acu: of these data ImageClassifier does not log it" in err
    assert "epoch" not in out
