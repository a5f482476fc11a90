"""Nothing that comes with a file is executed: runs, checkpoints, adapters and pictures that would create a
file, each of which is refused by one message; and the proof that each would."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from payloads import NODES, carry_out, npy, other_letters, pickled
from safetensors.torch import save_file
from small import Classifier, loader, mlp, trainer
from torchvision.io import write_png

import lora_lightning as ll
from lora_lightning.adapter_pair import CONFIG_FILE, TENSOR_FILE, digest_of, read_tensors
from lora_lightning.app.application import main as train
from lora_lightning.app.check import checkpoint_problems
from lora_lightning.app.foreign import KNOWN, refuse_foreign_recipes
from lora_lightning.app.predict import predict
from lora_lightning.app.recognizer import recognizer
from lora_lightning.app.resume import resumed
from lora_lightning.checkpoint_digests import KEY, add_digests
from lora_lightning.data.detection import opened_image, read_image
from lora_lightning.data.findings import DataError
from lora_lightning.export import merge_files, rebuilt_model
from lora_lightning.inspection import inspect
from lora_lightning.rebuild import BUILDERS, DEEPEST, MOST, plain_values
from lora_lightning.source import read_source

TIMM = "lora_lightning.models.timm.timm_model"
DATA = "lora_lightning.data.digits.DigitsDataModule"
TASKS = {
    "merge": "lora_lightning.tasks.classification.ImageClassifier",
    "transcribe": "lora_lightning.tasks.ctc.SpeechRecognizer",
    "predict": "lora_lightning.tasks.detection.ObjectDetector",
}
BY_HYDRA = ("open", "mkdir", "touch", "torch_load", "numpy_load", "through_a_model", "through_data")
RESOLVERS = ("${oc.env:HOME}", "${oc.decode:'1'}", "${oc.create:{a:1}}", "${hydra:runtime.cwd}", "${now:%Y}")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2))
    ll.save_adapter(model, folder)
    return folder


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def run(tmp_path: Path, adapter: Path) -> Path:
    """A run's folder with an adapter in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(adapter)
    return tmp_path / "run"


@pytest.fixture(scope="module", autouse=True)
def _resolver() -> Any:
    """What a plugin or a script may have registered."""
    OmegaConf.register_new_resolver("evil", lambda path: open(path, "w").close() or 1, replace=True)
    yield
    OmegaConf.clear_resolver("evil")


def config_for(command: str) -> dict[str, Any]:
    return {
        "model": {"_target_": TIMM, "name": "vit_tiny_patch16_224"},
        "data": {"_target_": DATA, "train_size": 10},
        "task": {"_target_": TASKS[command]},
        "trainer": {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "precision": "32-true"},
    }


def use(command: str, run: Path) -> None:
    """What a user does with the folder of somebody else."""
    if command == "merge":
        merge_files(run / "adapter", run / "out.safetensors")
    elif command == "transcribe":
        recognizer(str(run / "adapter"))
    else:
        predict({"adapter": str(run / "adapter"), "out": str(run / "out")}, [])


def refusal(act: Callable[[], object], marker: Path) -> str:
    """The one message of ours with which it is refused; nothing has run."""
    with pytest.raises(ll.UserError) as caught:
        act()
    assert not marker.exists()
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NODES)
def test_each_payload_would_run(name, marker):
    """The control: whoever does what the nodes say creates the marker, and Hydra does what these say."""
    with contextlib.suppress(RuntimeError):  # of torch, about what it has unpickled
        carry_out(NODES[name](marker))
    assert marker.exists()


@pytest.mark.parametrize("name", BY_HYDRA)
def test_hydra_itself_refuses_few(name, marker):
    with contextlib.suppress(InstantiationException):  # of torch again
        instantiate(OmegaConf.create(NODES[name](marker)))
    assert marker.exists()


@pytest.mark.parametrize("command", TASKS)
@pytest.mark.parametrize("name", NODES)
def test_a_run_builds_no_foreign_model(name, command, run, marker):
    node = NODES[name](marker)
    (run / "config.yaml").write_text(yaml.safe_dump({**config_for(command), "model": node}))
    told = refusal(lambda: use(command, run), marker)
    assert f"model._target_={node['_target_']} is not run unasked" in told
    assert str(run / "config.yaml") in told


# Where a node can stand in a run's configuration: what is put there, and the key that is told.
PLACES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "an option": (lambda n: {"model.img_size": n}, "model.img_size._target_"),
    "deep": (lambda n: {"model.a": {"b": {"c": n}}}, "model.a.b.c._target_"),
    "a list": (lambda n: {"model.sizes": [1, [n]]}, "model.sizes.1.0._target_"),
    "the data": (lambda n: {"data": n}, "data._target_"),
    "an option of the data": (lambda n: {"data.train_size": n}, "data.train_size._target_"),
    "a reference": (lambda n: {"evil": n, "model.img_size": "${evil}"}, "model.img_size._target_"),
    "two references": (
        lambda n: {"a": {"b": ["${evil}"]}, "evil": n, "model.img_size": "${a.b}"},
        "model.img_size.0._target_",
    ),
    "the section by reference": (lambda n: {"evil": n, "model": "${evil}"}, "model._target_"),
    "a target by reference": (
        lambda n: {"evil": n, "model": {**n, "_target_": "${evil._target_}"}},
        "model._target_",
    ),
    "a target in parts": (
        lambda n: {"x": n["_target_"][:5], "y": n["_target_"][5:], "model": {**n, "_target_": "${x}${y}"}},
        "model._target_",
    ),
    "positional": (lambda n: {"model._args_": [n]}, "model._args_"),
    "partial": (lambda n: {"model._partial_": True, "model.x": n}, "model._partial_"),
}


@pytest.mark.parametrize("command", TASKS)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_builds_nothing_within(place, command, run, marker):
    made, key = PLACES[place]
    node = NODES["mkdir"](marker)
    config = config_for(command)
    for path, value in made(node).items():
        section, _, name = path.partition(".")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    told = refusal(lambda: use(command, run), marker)
    assert f"{key}=" in told and "is not run unasked" in told


@pytest.mark.parametrize(
    "target", [other_letters(TIMM), f"{TIMM}\u200b", TIMM.upper(), f"{TIMM}.__globals__", ["x"]]
)
def test_names_that_look_alike_are_others(target, run, marker):
    (run / "config.yaml").write_text(yaml.safe_dump({**config_for("merge"), "model": {"_target_": target}}))
    assert "model._target_=" in refusal(lambda: use("merge", run), marker)


FACTS = {
    "a fact": lambda n: {"num_classes": n},
    "in a list": lambda n: {"class_names": ["a", n]},
    "in a mapping": lambda n: {"vocabulary": {"a": {"b": n}}},
    "by reference": lambda n: {"evil": n, "num_classes": "${evil}"},
    "the file itself": lambda n: n,
}


@pytest.mark.parametrize("command", TASKS)
@pytest.mark.parametrize("place", FACTS)
def test_facts_are_plain(place, command, run, marker):
    (run / "config.yaml").write_text(yaml.safe_dump(config_for(command)))
    (run / "provides.yaml").write_text(yaml.safe_dump(FACTS[place](NODES["mkdir"](marker))))
    told = refusal(lambda: use(command, run), marker)
    assert f"{run / 'provides.yaml'}: " in told and "is not run unasked" in told


@pytest.mark.parametrize("name", BY_HYDRA[:3])
def test_facts_beside_a_recipe_are_plain(name, run, marker):
    """The recipe is ours, what the run's data said of themselves is not."""
    (run / "config.yaml").write_text(yaml.safe_dump(config_for("predict")))
    (run / "provides.yaml").write_text(yaml.safe_dump({"num_classes": NODES[name](marker)}))
    (run / "images").mkdir()
    write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(run / "images" / "a.png"))
    options = {"adapter": str(run / "adapter"), "out": str(run / "out"), "images": str(run / "images")}
    told = refusal(lambda: predict(options, ["recipe=fcos_shapes"]), marker)
    assert "num_classes._target_=" in told and "is not run unasked" in told


@pytest.mark.parametrize("file", ["config.yaml", "provides.yaml"])
@pytest.mark.parametrize("command", TASKS)
def test_tags_of_yaml_build_nothing(command, file, run, marker):
    tagged = f"model: !!python/object/apply:os.system ['touch {marker}']\n"
    (run / "config.yaml").write_text(yaml.safe_dump(config_for(command)))
    (run / file).write_text(tagged)
    told = refusal(lambda: use(command, run), marker)
    assert f"{run / file} cannot be read" in told and "Nothing in it was run" in told
    yaml.unsafe_load(tagged)
    assert marker.exists()


@pytest.mark.parametrize("text", [*RESOLVERS, "${evil:MARKER}", "a${evil:MARKER}b", "${${x}:MARKER}", "${"])
def test_resolvers_are_not_evaluated(text, run, marker):
    text = text.replace("MARKER", str(marker))
    for place in ({"model.img_size": text}, {"model._target_": text}, {"model.img_size": "${x}", "x": text}):
        config = config_for("merge")
        for path, value in place.items():
            section, _, name = path.partition(".")
            config.update({section: {**config[section], name: value} if name else value})
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert "is not evaluated" in refusal(lambda: use("merge", run), marker)
    (run / "config.yaml").write_text(yaml.safe_dump(config_for("merge")))
    (run / "provides.yaml").write_text(yaml.safe_dump({"num_classes": text}))
    assert "is not evaluated" in refusal(lambda: use("merge", run), marker)


def test_the_resolver_would_run(marker):
    assert OmegaConf.create({"x": f"${{evil:{marker}}}"}).x == 1
    assert marker.exists()


def test_references_end(run):
    where = run / "config.yaml"
    for values, told in (
        ({"model": "${a}", "a": "${model}"}, "refers to itself"),
        ({"model": {"a": "${model}"}}, "refers to itself"),
        ({"model": "${nothing.here}"}, "which the file does not have"),
        (
            {"model": "${a}", **{chr(i): [f"${{{chr(i + 1)}}}"] * 9 for i in range(97, 110)}, "n": 1},
            "holds too much",
        ),
        ({"model": b"bytes"}, "no plain value"),
        ({"model": {("a", "b"): 1}}, "which is no word"),
    ):
        with pytest.raises(ll.UserError, match=told):
            plain_values(values, "model", where)
    assert MOST > 10_000 and DEEPEST > 10
    values = {"model": {"a": "${b.0}", "c": "x${b.1}"}, "b": [[1], 2]}
    assert plain_values(values, "model", where) == {"a": [1], "c": "x2"}


@pytest.mark.parametrize(
    "damage", ["trainer.accelerator", "trainer.precision", "data.batch_size", "trainer", "data"]
)
def test_predict_refuses_what_is_no_option(damage, run, marker):
    config = config_for("predict")
    section, _, name = damage.partition(".")
    (run / "provides.yaml").write_text("num_classes: 2\n")
    node = NODES["mkdir"](marker)
    config[section] = {**config[section], name: node} if name else [node]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"{damage}=" in refusal(lambda: use("predict", run), marker)


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
    "through the package": lambda m: ["task._target_=lora_lightning.source.os.system"],
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
        train(["--config-dir", str(tmp_path), "recipe=builds", "data.seed=-1"])
    assert marker.exists()


class Obedient(Classifier):
    """A module that has Hydra build what its hyperparameters say."""

    def __init__(self, net: Any = None, lr: float = 0.05) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        if net:
            instantiate(OmegaConf.create(net))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fit")
    fitted = trainer(
        folder, ll.LoRACallback(rank=2), max_epochs=1, limit_train_batches=1, enable_checkpointing=False
    )
    fitted.fit(Obedient(), loader())
    fitted.save_checkpoint(folder / "x.ckpt", weights_only=True)
    return torch.load(folder / "x.ckpt", weights_only=True)


def save_forged(checkpoint: dict[str, Any], path: Path, key: str, values: dict[str, Any]) -> None:
    """With other hyperparameters, and the checksums that belong to them."""
    forged = {name: value for name, value in checkpoint.items() if name != "hyper_parameters"} | {key: values}
    forged[KEY] = dict(forged[KEY])
    add_digests(forged)
    torch.save(forged, path)


CLI = "lightning.pytorch.cli.instantiate_module"
HYPERPARAMETERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "target": lambda m: {"net": NODES["mkdir"](m)},
    "nested": lambda m: {"net": {"a": [{"b": NODES["mkdir"](m)}]}},
    "class path": lambda m: {"net": {"class_path": "evil_module.Evil", "init_args": {}}},
    "class": lambda m: {"_class_path": "evil_module.Evil", "_instantiator": CLI},
    "instantiator": lambda m: {"_instantiator": "evil_module.build"},
    "objects by LightningCLI": lambda m: {
        "_instantiator": CLI, "net": {"a": "evil_module.f"}
    },
}  # fmt: skip


@pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_hyperparameters_call_nothing(name, key, checkpoint, tmp_path, marker, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n")
    values = HYPERPARAMETERS[name](marker)
    save_forged(checkpoint, tmp_path / "x.ckpt", key, values)
    told = refusal(lambda: ll.load_from_checkpoint(Obedient, tmp_path / "x.ckpt"), marker)
    assert "its hyperparameters name what is to be called" in told
    if "net" in values and "_instantiator" not in values:  # those that the caller gives are the caller's
        assert isinstance(ll.load_from_checkpoint(Obedient, tmp_path / "x.ckpt", net=None), Obedient)
        assert not marker.exists()


def test_plain_hyperparameters_of_lightning_cli_are_taken(checkpoint, tmp_path, marker, monkeypatch):
    noted = {"lr": 0.5, "_instantiator": CLI}
    save_forged(checkpoint, tmp_path / "x.ckpt", "hyper_parameters", noted)
    assert ll.load_from_checkpoint(Obedient, tmp_path / "x.ckpt").lr == 0.5
    save_forged(checkpoint, tmp_path / "x.ckpt", "hyper_parameters", {"net": NODES["mkdir"](marker)})
    ll.load_from_checkpoint(
        Obedient, tmp_path / "x.ckpt", weights_only=False
    )  # the control: trusted, it runs
    assert marker.exists()


def forged(folder: Path, adapter: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """An adapter's folder with another description, and the digest that belongs to it."""
    about = json.loads((adapter / CONFIG_FILE).read_text())
    change(about)
    about.pop("sha256")
    tensors, _ = read_tensors(adapter / TENSOR_FILE)
    digest = digest_of(about, tensors)
    folder.mkdir()
    save_file(tensors, folder / TENSOR_FILE, {"format": "pt", "sha256": digest})
    (folder / CONFIG_FILE).write_text(json.dumps({**about, "sha256": digest}))
    return folder


EVIL = {"_target_": "os.system", "command": "touch marker"}
FORGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "targets": lambda a: a["config"].update(target_modules=EVIL),
    "a target in a list": lambda a: a["config"].update(target_modules=[EVIL]),
    "rank": lambda a: a["config"].update(rank=EVIL),
    "an option": lambda a: a["config"].update(EVIL),
    "rank pattern": lambda a: a["config"].update(rank_pattern={"x": EVIL}),
    "a layer": lambda a: a["plan"]["layers"][0].update(
        name="__init__.__globals__", module="__init__.__globals__"
    ),
    "a layer's rank": lambda a: a["plan"]["layers"][0].update(rank=EVIL),
    "a slot": lambda a: next(iter(a["slots"].values())).update(parameter=EVIL),
    "a slot by attribute": lambda a: next(iter(a["slots"].values())).update(parameter="__class__"),
    "training": lambda a: a.update(training=[EVIL]),
    "base": lambda a: a.update(base=EVIL),
}


@pytest.mark.parametrize("name", FORGED)
def test_an_adapter_names_nothing_to_call(name, adapter, tmp_path, marker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = forged(tmp_path / "forged", adapter, FORGED[name])
    model = mlp()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    refusal(lambda: ll.load_adapter(model, folder, any_base=True), marker)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


PEFT: dict[str, dict[str, Any]] = {
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "evil_module"},
    "type": {"peft_type": EVIL},
    "bias": {"bias": EVIL},
    "initialization": {"init_lora_weights": "evil_module"},
    "rank": {"r": EVIL},
}


@pytest.mark.parametrize("name", PEFT)
def test_an_adapter_of_peft_names_nothing_to_import(name, tmp_path, marker, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n")
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2))
    ll.save_adapter(model, tmp_path / "peft", format="peft")
    file = tmp_path / "peft" / CONFIG_FILE
    about = json.loads(file.read_text())
    mapping = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"}}
    file.write_text(json.dumps(about | PEFT[name] | mapping))
    refusal(lambda: ll.load_adapter(mlp(), tmp_path / "peft", any_base=True), marker)
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("contents", [pickled, npy], ids=["pickle", "npy"])
def test_no_file_is_unpickled(contents, adapter, run, tmp_path, marker):
    file = tmp_path / "evil.ckpt"
    file.write_bytes(contents(marker))
    config = config_for("merge")
    config["model"]["checkpoint"] = str(file)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "provides.yaml").write_text("num_classes: 2\n")
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes((adapter / CONFIG_FILE).read_bytes())
    (folder / TENSOR_FILE).write_bytes(contents(marker))
    named = tmp_path / "evil.safetensors"
    named.write_bytes(contents(marker))
    for act in (
        lambda: read_source(file),
        lambda: inspect(file),
        lambda: inspect(named),
        lambda: merge_files(adapter, tmp_path / "out.safetensors", named),
        lambda: ll.load_adapter(mlp(), folder),
        lambda: use("merge", run),
    ):
        refusal(act, marker)
    refusal(lambda: ll.load_from_checkpoint(Classifier, file), marker)
    assert checkpoint_problems(str(file)) and not marker.exists()
    (folder / CONFIG_FILE).write_bytes(contents(marker))
    refusal(lambda: ll.load_adapter(mlp(), folder), marker)


@pytest.mark.parametrize(
    "about", [json.dumps(EVIL), "!!python/object/apply:os.system ['touch marker']", "{", "[]"]
)
def test_metadata_are_read_alone(about, tmp_path, marker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"lora_lightning": about})
    assert "no adapter" in refusal(lambda: inspect(tmp_path / "x.safetensors"), marker)


def test_a_page_holds_no_orders_to_the_terminal(adapter, tmp_path):
    """Names in files may hold control characters, which clear it, set its title, turn the writing round."""

    def rename(about: dict[str, Any]) -> None:
        about["base_class"] = "A\x1b]0;evil\x07\x9b2J\u202eB"

    page = inspect(forged(tmp_path / "forged", adapter, rename))
    assert r"A\x1b]0;evil\x07\x9b2J\u202eB" in page
    about = {
        "merged_from": "\x1b[2J",
        "recipe": "",
        "training": {},
        "base_class": "",
        "base": "",
        "layers": 1,
    }
    metadata = {"lora_lightning": json.dumps({**about, "rounding": [0, 0]})}
    save_file({"x\x1b": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    assert r"\x1b[2J" in (page := inspect(tmp_path / "x.safetensors")) and "\x1b" not in page


def test_postscript_is_no_picture(tmp_path, marker, monkeypatch):
    """PIL hands it to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin, Image

    def ghostscript(*_: Any, **__: Any) -> Any:
        marker.touch()
        return Image.new("RGB", (4, 4)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    file = tmp_path / "picture.tif"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(file)
    with pytest.raises(OSError, match="cannot identify"):
        opened_image(file)
    assert not marker.exists()
    Image.open(file).load()
    assert marker.exists()


def test_the_lists_are_those_of_the_configuration():
    """Whatever `conf/` names can be built again and resumed, and a list names what exists."""
    from lora_lightning.app.compose import CONF, RECIPES

    named: dict[str, set[str]] = {}
    for path in [*CONF.rglob("*.yaml"), *RECIPES.rglob("*.yaml")]:
        group = path.parent.name
        lines = (line.strip() for line in path.read_text().splitlines())
        named.setdefault(group, set()).update(
            line[9:].strip() for line in lines if line.startswith("_target_:")
        )
    for section, names in BUILDERS.items():
        assert named[section] == set(names)
    assert set().union(*named.values()) <= KNOWN
    assert all(name in KNOWN for names in BUILDERS.values() for name in names)


def test_a_run_of_ones_own_is_rebuilt(tmp_path):
    """Also where its data are of the user's own class: what they said stands in the run's folder."""
    from lora_lightning.models.timm import timm_model

    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm_model("vit_tiny_patch16_224", num_classes=3, **options)
    ll.inject(model, ll.LoRAConfig(rank=2))
    ll.save_adapter(model, tmp_path / "run" / "adapter")
    config = config_for("merge") | {"size": 16, "data": {"_target_": "photos.Photos"}}
    config["model"] |= options | {"img_size": "${size}"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    source = read_source(tmp_path / "run" / "adapter")
    with pytest.raises(ll.UserError, match=r"data\._target_=photos\.Photos is not run unasked"):
        rebuilt_model(source.run_config(), source)
    (tmp_path / "run" / "provides.yaml").write_text("num_classes: 3\nclass_names: [a, b, c]\nrate: 0.5\n")
    rebuilt, facts = rebuilt_model(source.run_config(), source)
    ll.eject(model)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()
    assert facts["class_names"] == ["a", "b", "c"]
    for facts in ({"num_classes": "3"}, {"class_names": "abc"}, {"category_ids": ["1"]}):
        (tmp_path / "run" / "provides.yaml").write_text(yaml.safe_dump(facts))
        with pytest.raises(ll.UserError, match="the file is damaged"):
            source.facts()
    (tmp_path / "run" / "provides.yaml").write_text("{}")
    config["model"]["img_sze"] = 4
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ll.UserError, match=r"(?s)the base cannot be rebuilt as .*img_sze=4"):
        rebuilt_model(source.run_config(), source)
