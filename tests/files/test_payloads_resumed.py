"""Nothing that a resumed run brings, and nothing of a recipe that is only looked at, is executed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from payloads import (
    TIMM,
    other_letters,
    pickled,
    refusal,
)

import lora_lightning as ll
from lora_lightning.app.application import main as train
from lora_lightning.app.check import checkpoint_problems
from lora_lightning.app.foreign import refuse_foreign_recipes
from lora_lightning.app.resume import resumed

pytestmark = pytest.mark.usefixtures("resolver")

WORDS: dict[str, Callable[[Path], list[str]]] = {
    "model": lambda m: ["model._target_=os.mkdir", f"+model.path='{m}'"],
    "nested": lambda m: [f"+model.x={{_target_:os.mkdir,path:'{m}'}}"],
    "list": lambda m: [f"+model.x=[1,{{_target_:os.mkdir,path:'{m}'}}]"],
    "callback": lambda m: [
        "+callbacks.x._target_=os.mkdir",
        f"+callbacks.x._args_=['{m}']",
    ],
    "logger": lambda m: [f"+logger.x={{_target_:os.mkdir,path:'{m}'}}"],
    "strategy": lambda m: [f"trainer.strategy={{_target_:os.mkdir,path:'{m}'}}"],
    "reference": lambda m: [f"+evil={{_target_:os.mkdir,path:'{m}'}}", "+model.x=${evil}"],
    "target by reference": lambda m: ["+evil=os.system", "model._target_=${evil}"],
    "beside a known one": lambda m: [
        f"+callbacks.x={{_target_:lightning.pytorch.callbacks.Timer,y:{{_target_:os.mkdir,path:'{m}'}}}}"
    ],
    "through the package": lambda m: ["task._target_=lora_lightning.files.locate.os.system"],
    "look-alike": lambda m: [f"model._target_={other_letters(TIMM)}"],
    "positional": lambda m: ["+model._args_=[1]"],
    "partial": lambda m: ["+model._partial_=true"],
    "resolver": lambda m: [f"+model.x='${{evil:{m}}}'"],
    "environment": lambda m: ["+model.x=${oc.env:HOME}"],
    "hydra": lambda m: [f"hydra.job_logging.handlers.x={{'()':os.system,command:'touch {m}'}}"],
    "hydra's callbacks": lambda m: [f"+hydra.callbacks.x={{_target_:os.mkdir,path:'{m}'}}"],
    "hydra's launcher": lambda m: ["hydra/launcher=evil"],
    "hydra's search path": lambda m: [f"hydra.searchpath=[file://{m.parent}]"],
    "into hydra": lambda m: ["model@hydra.launcher=vit_digits"],
    "sweep": lambda m: ["model._target_=os.system,os.mkdir"],
    "glob": lambda m: ["model=glob(*)"],
    "unreadable": lambda m: ["model._target_=os.system}"],
}


@pytest.mark.parametrize("words", WORDS)
def test_a_resumed_run_brings_nothing_that_runs(words, run, marker, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    (run / ".hydra").mkdir()
    given = WORDS[words](marker)
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["recipe=vit_digits", *given]))
    with pytest.raises(SystemExit) as caught:
        train(["resume=run"])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and not marker.exists() and "Traceback" not in told
    assert "is not run unasked" in told and "resume=run" in told


def test_what_the_user_repeats_is_the_users(run, marker, monkeypatch):
    """Each word that is refused comes with the command that runs it; what is ours comes back by itself."""
    monkeypatch.chdir(run.parent)
    (run / ".hydra").mkdir()
    ours = [
        "recipe=vit_digits",
        "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping",
        "tags=[a]",
    ]
    file = run / ".hydra" / "overrides.yaml"
    file.write_text(yaml.safe_dump([*ours, "data._target_=photos.Photos", "data.root=${oc.env:DATA}"]))
    own = ["hydra.run.dir='run'", "ckpt_path=last"]
    with pytest.raises(ll.ConfigError) as caught:
        resumed(["resume=run"])
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].endswith("resume=run data._target_=photos.Photos")
    words = ["data._target_=photos.Photos", "data.root=${oc.env:DATA}"]
    assert resumed(["resume=run", *words]) == [*words, *ours, *own]
    for text in (f"!!python/object/apply:os.system ['touch {marker}']", "a: b", "- [1]", "- {", "\x00"):
        file.write_text(text)
        assert "overrides.yaml" in refusal(lambda: resumed(["resume=run"]), marker)


def test_a_checkpoint_of_deepspeed_is_the_users_to_trust(run, monkeypatch):
    """DeepSpeed unpickles its files; where FSDP's unpickled description lies beside, nothing can be meant."""
    monkeypatch.chdir(run.parent)
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text("[]")
    last = run / "checkpoints" / "last.ckpt"
    (last / "checkpoint").mkdir(parents=True)
    with pytest.raises(ll.ConfigError, match=r"folder of DeepSpeed.*resume=run ckpt_path=last"):
        resumed(["resume=run"])
    resumed(["resume=run", "ckpt_path=last"])
    assert not checkpoint_problems(str(last))
    (last / ".metadata").write_bytes(b"")
    assert "is a folder" in checkpoint_problems(str(last))[0]


RECIPES: dict[str, Callable[[Path], str]] = {
    "target": lambda m: f"model: {{_target_: os.system, command: touch {m}}}",
    "list": lambda m: f"a: [{{_target_: os.system, command: touch {m}}}]",
    "resolver": lambda m: f"a: ${{evil:{m}}}",
    "hydra": lambda m: (
        f"hydra: {{job_logging: {{handlers: {{x: {{'()': os.system, command: touch {m}}}}}}}}}"
    ),
    "package": lambda m: f"# @package hydra.launcher\n_target_: os.system\ncommand: touch {m}",
    "defaults": lambda m: "defaults: [/../../evil]",
    "tag": lambda m: f"a: !!python/object/apply:os.system ['touch {m}']",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_a_run_brings_are_plain(name, run, marker):
    (run.parent / "mine" / "recipe").mkdir(parents=True)
    (run.parent / "mine" / "recipe" / "good.yaml").write_text(
        "# @package _global_\nlora: {rank: 2}\nx: ${seed}\n"
    )
    refuse_foreign_recipes(run, run.parent / "mine")
    (run.parent / "mine" / "recipe" / "bad.yaml").write_text(RECIPES[name](marker))
    told = refusal(lambda: refuse_foreign_recipes(run, run.parent / "mine"), marker)
    assert "bad.yaml" in told and "good.yaml" not in told and "is not run unasked" in told
    (run.parent / "mine" / "recipe" / "bad.yaml").rename(run.parent / "mine" / "apex.py")
    assert "apex.py: it is code" in refusal(lambda: refuse_foreign_recipes(run, run.parent / "mine"), marker)


@pytest.mark.parametrize(
    "flag", ["--experimental-rerun=evil.pickle", "--exp=evil.pickle", "--experimental-rerun"]
)
def test_a_pickled_job_is_not_run_again(flag, tmp_path, marker, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pickle").write_bytes(pickled(marker))
    with pytest.raises(SystemExit) as caught:
        train([flag, *(["evil.pickle"] if "=" not in flag else [])])
    assert caught.value.code == 2 and not marker.exists()
    assert "would unpickle a file" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--help"], ["--cfg", "job"]], ids=lambda f: f[0])
def test_to_look_at_a_recipe_runs_nothing_of_it(flag, tmp_path, marker, monkeypatch, capsys):
    """Where its source does not tell what a class takes, that stays unknown; a run imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    module = f"evil_{flag[0].strip('-')}"
    (tmp_path / f"{module}.py").write_text(f"open({str(marker)!r}, 'w')\nbuild = dict\n")
    log = {
        "handlers": {"x": {"()": "os.mkdir", "path": str(marker)}},
        "root": {"handlers": ["x"]},
        "version": 1,
    }
    builds = {"model": {"_target_": f"{module}.build"}, "data": {"_target_": f"{module}.build"}}
    (tmp_path / "recipe").mkdir()
    for name, content in (("builds", builds), ("logs", {"hydra": {"hydra_logging": log}})):
        (tmp_path / "recipe" / f"{name}.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(content)}")
    with contextlib.suppress(SystemExit):
        train(["--config-dir", str(tmp_path), "recipe=builds", *flag])
    assert not marker.exists() and "in the configuration" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(["--config-dir", str(tmp_path), "recipe=logs", *flag])
    assert not marker.exists() and "hydra.hydra_logging: is changed" in capsys.readouterr().err
    with contextlib.suppress(SystemExit):  # the control
        train(["--config-dir", str(tmp_path), "recipe=builds", "seed=-1"])
    assert marker.exists()
