"""What travels with weights: written, read as a stranger's, and enough where it is copied to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from payloads import NODES, TASKS, config_for, refusal, use
from small import mlp
from test_payloads_in_files import forged

import lora_lightning as ll
from lora_lightning.app.inspect import inspect
from lora_lightning.app.rebuild import merge_files, rebuilt_model
from lora_lightning.errors import AdapterFileError
from lora_lightning.files.locate import WeightsSource, read_source, read_trained
from lora_lightning.files.origin import Origin
from lora_lightning.files.pair import CONFIG_FILE
from lora_lightning.files.weights import write_weights

FACTS = {"class_names": ["cat", "dog"], "input_size": [3, 8, 16], "temperature": 1.5, "crop_pct": 0.9}


def saved(folder: Path, **options: Any) -> Path:
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    return ll.save_adapter(model, folder, **options)


@pytest.mark.parametrize("form", ["lora_lightning", "peft"])
def test_facts_of_ones_own_travel(form: str, tmp_path: Path) -> None:
    saved(tmp_path / "a", format=form, origin={"facts": FACTS})
    source = read_source(tmp_path / "a")
    assert source.facts() == FACTS and source.config() == {} and source.recipe() == ""
    page = inspect(tmp_path / "a")
    assert "classes      2: cat, dog\n" in page
    assert "pictures     16 × 8 pixels, the middle 90 %\n" in page and "temperature  1.5" in page
    ll.load_adapter(mlp(), tmp_path / "a", check_base=False)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG_FILE, "adapter_model.safetensors"]
    saved(tmp_path / "a", format=form)  # of another save nothing stays
    assert read_source(tmp_path / "a").facts() is None


@pytest.mark.parametrize(
    "origin",
    [{"facts": {"a": {1, 2}}}, {"fact": {}}, {"facts": []}, {"facts": {"class_names": "cat"}}, "cat",
     {"facts": {"temperature": 0}}, {"facts": {"a": {"b": 1}}}, {"config": {"_target_": mlp}}],
)  # fmt: skip
def test_what_cannot_travel_is_told_before_anything_is_written(origin: Any, tmp_path: Path) -> None:
    with pytest.raises(ll.ConfigError, match="origin"):
        saved(tmp_path / "a", origin=origin)
    assert not (tmp_path / "a").exists()


def test_what_of_a_run_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "base.safetensors").touch()
    (tmp_path / "source").mkdir()  # a word that is also a folder's name
    data = {
        "_target_": "d",
        "domain": "source",
        "root": "photos",
        "manifest": "/home/me/a.csv",
        "val_size": 0.1,
        "splits": ["a/b"],
    }
    config = {
        "model": {"_target_": "m", "checkpoint": "base.safetensors", "name": "photo"},
        "data": data,
        "trainer": {"accelerator": "cpu", "precision": 32, "max_epochs": 3},
        "optim": {"lr": 1},
    }
    origin = Origin.of_run("mine", config, {"num_classes": 2})
    assert origin.config == {
        "model": {"_target_": "m", "checkpoint": str(tmp_path / "base.safetensors"), "name": "photo"},
        "data": {"_target_": "d", "domain": "source", "val_size": 0.1},
        "trainer": {"accelerator": "cpu", "precision": 32},
    }
    assert (origin.recipe, origin.facts) == ("mine", {"num_classes": 2})


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ("vit_digits", False),  # shipped weights, though a folder is called so too
        ("resnet18.a1_in1k", False),
        ("weights/saved", True),
        ("saved.safetensors", True),
    ],
)
def test_weights_are_found_from_elsewhere_and_names_stay(
    given: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vit_digits", "resnet18.a1_in1k", "weights/saved"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "weights/saved/config.json").write_text("{}")
    (tmp_path / "saved.safetensors").touch()
    model = {"checkpoint": given, "name": "local-dir:weights/saved"}
    found = Origin.of_run("mine", {"model": model}, {}).config["model"]
    assert found["checkpoint"] == (str(tmp_path / given) if whole else given)
    assert found["name"] == f"local-dir:{tmp_path / 'weights/saved'}"


@pytest.mark.parametrize(("method", "kind"), [("full", "weights"), ("lora", "adapter folder")])
def test_a_folder_that_was_used_twice_means_what_its_run_saved(
    method: str, kind: str, tmp_path: Path
) -> None:
    saved(tmp_path / "adapter")
    write_weights(tmp_path / "model.safetensors", mlp().state_dict(), {})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": method, "model": {}}))
    assert read_trained(tmp_path).kind == kind


BAD_FACTS = {
    "input_size": [3, 10**6, 10**6], "mean": [0, 0], "std": [1, 1, 0], "interpolation": "random",
    "crop_pct": 2, "crop_mode": "off", "temperature": float("nan"), "target": "clas", "number_std": True,
    "number_mean": "1", "class_weights": ["1"], "num_classes": 2.5, "category_ids": [1.5], "class_names": [1],
}  # fmt: skip


def test_forged_facts_are_refused(tmp_path: Path, adapter: Path) -> None:
    for name, value in BAD_FACTS.items():
        folder = forged(tmp_path / name, adapter, lambda a: a.update(origin={"facts": {name: value}}))  # noqa: B023
        source = read_source(folder)
        with pytest.raises(ll.UserError, match=rf"{name}=.*the file is damaged: this is"):
            source.facts()


def test_an_origin_of_another_kind_is_damage(tmp_path: Path, adapter: Path) -> None:
    for number, value in enumerate([[], "x", {"facts": []}, {"config": 1}, {"recipe": {}}, {"more": 1}]):
        folder = forged(tmp_path / str(number), adapter, lambda a: a.update(origin=value))  # noqa: B023
        with pytest.raises(ll.AdapterFileError, match="is damaged: its origin"):
            read_source(folder)


@pytest.mark.parametrize("command", TASKS)
@pytest.mark.parametrize("name", ["open", "mkdir", "through_the_package", "numpy_load"])
def test_nothing_that_travels_is_executed(name: str, command: str, tmp_path: Path, adapter: Path) -> None:
    """Wherever it stands, in an adapter's folder that lies in no run."""
    marker = tmp_path / "marker"
    node = NODES[name](marker)
    config = config_for(command)
    places = {
        "model": {"config": {**config, "model": node}},
        "an option": {"config": {**config, "model": {**config["model"], "img_size": node}}},
        "data": {"config": {**config, "data": node}},
        "facts": {"config": config, "facts": {"num_classes": node}},
        "a reference": {"config": {**config, "evil": node, "model": "${evil}"}},
        "a resolver": {"config": {**config, "model": {**config["model"], "name": "${oc.env:HOME}"}}},
    }
    for place, origin in places.items():
        run = tmp_path / place
        run.mkdir()
        forged(run / "adapter", adapter, lambda a: a.update(origin=origin))  # noqa: B023
        told = refusal(lambda: use(command, run), marker)  # noqa: B023
        assert "is not run unasked" in told or "is not evaluated" in told, place
        assert f"{CONFIG_FILE}: " in told, place


def test_a_folder_alone_rebuilds_its_model(tmp_path: Path) -> None:
    """Copied out of its run; what it says goes before what the run says, and into a merged file."""
    from lora_lightning.models.timm import timm_model

    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm_model("vit_tiny_patch16_224", num_classes=3, **options)
    ll.inject(model, ll.LoRAConfig(rank=2))
    section = {
        "_target_": config_for("merge")["model"]["_target_"],
        "name": "vit_tiny_patch16_224",
        **options,
    }
    origin = {"recipe": "mine", "config": {"model": section}, "facts": {**FACTS, "num_classes": 3}}
    origin["facts"]["class_names"] = ["a", "b", "c"]
    ll.save_adapter(model, tmp_path / "run" / "adapter", origin=origin)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"model": {"_target_": "os.system"}}))
    source = read_source(tmp_path / "run" / "adapter")
    rebuilt, facts = rebuilt_model(source.config(), source)
    assert facts["class_names"] == ["a", "b", "c"] and source.recipe() == "mine"
    base = {n: t.clone() for n, t in model.state_dict().items() if "lora" not in n}
    assert {n: t.shape for n, t in rebuilt.state_dict().items()} == {n: t.shape for n, t in base.items()}
    ll.eject(model)
    from lora_lightning.files.random_base import keep_base

    keep_base(model, tmp_path / "run" / "adapter")  # beside the adapter it is found too
    merge_files(tmp_path / "run" / "adapter", tmp_path / "merged.safetensors")
    page = inspect(tmp_path / "merged.safetensors")
    assert "recipe mine" in page and "classes      3: a, b, c" in page


def test_a_page_of_trained_weights(tmp_path: Path) -> None:
    from lora_lightning.files.weights import write_weights

    path = tmp_path / "model.safetensors"
    write_weights(path, mlp().state_dict(), {"origin": {"recipe": "mine", "facts": FACTS}})
    page = inspect(path)
    assert "(trained weights)" in page and "recipe mine" in page and "2: cat, dog" in page
    for about in ({}, {"origin": {"facts": []}}, {"origin": {}}):
        write_weights(path, mlp().state_dict(), about)
        with pytest.raises(ll.AdapterFileError, match="plain safetensors file"):
            inspect(path)
    write_weights(path, mlp().state_dict(), {"origin": json.loads('{"facts": {"temperature": -1}}')})
    with pytest.raises(ll.UserError, match="the file is damaged"):
        inspect(path)


def test_of_several_adapters_one_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path / "scottish" / "adapter")
    with pytest.raises(AdapterFileError, match=r"several adapters. Give one: .*scottish/adapter\."):
        read_trained(tmp_path)


def test_the_folder_of_a_method_means_its_best_checkpoint(tmp_path: Path) -> None:
    """Of a method that the run was compared with, which saved nothing else; its run says how it is built."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": "lora", "model": {"name": "vit"}}))
    folder = tmp_path / "full"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": mlp().state_dict()}, folder / "checkpoints" / "best.ckpt")
    found = read_trained(folder)
    assert isinstance(found, WeightsSource) and found.weights.keys() == mlp().state_dict().keys()
    assert found.run == tmp_path and found.config()["model"] == {"name": "vit"}
    (folder / "config.yaml").touch()  # a run of its own, which has not ended
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        read_trained(folder)
