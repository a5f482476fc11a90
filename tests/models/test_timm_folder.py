"""Models that somebody has saved with timm: in a folder, on the hub; JSON and safetensors alone are read."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub as hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from lora_lightning.data.picture_transform import preprocessing_of
from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError
from lora_lightning.models.timm import timm_model

OPTIONS = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
MEAN = (0.1, 0.2, 0.3)


@pytest.fixture
def saved(tmp_path) -> tuple[torch.nn.Module, Path]:
    """A model of six classes, as timm itself saves it, and its folder."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=6, **OPTIONS)
    model.pretrained_cfg["mean"] = MEAN
    folder = tmp_path / "saved"
    save_for_hf(model, str(folder), model_args=OPTIONS, safe_serialization=True)
    return model, folder


def changed(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def same(one, other) -> bool:
    return all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())


@pytest.mark.parametrize("classes", [None, 4])
def test_a_folder(saved, classes):
    model, folder = saved
    found = timm_model(f"local-dir:{folder}", pretrained=True, num_classes=classes)
    assert found.num_classes == (classes or 6)
    assert torch.equal(found.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert tuple(preprocessing_of(found)["mean"]) == MEAN
    assert found.patch_embed.img_size == (32, 32)
    assert classes or same(found, model)


def test_timm_itself_reads_it_the_same(saved):
    folder = saved[1]
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert same(timm_model(f"local-dir:{folder}", pretrained=True), theirs)


def test_the_hubs_cache_and_options_of_ones_own(saved, tmp_path, monkeypatch):
    model, folder = saved
    cache = tmp_path / "hub"
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError, match=r"config\.json model\.safetensors") as error:
        timm_model("hf-hub:ann/photos", pretrained=True)
    assert "model.name=local-dir:weights" in str(error.value)
    place = cache / "models--ann--photos"
    (place / "snapshots").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    folder.rename(place / "snapshots" / ("0" * 40))
    assert same(timm_model("hf-hub:ann/photos", pretrained=True), model)
    larger = timm_model("hf_hub:ann/photos", pretrained=True, img_size=64, drop_path_rate=0.1)
    assert larger.patch_embed.img_size == (64, 64)
    assert not same(timm_model("hf-hub:ann/photos"), model)  # without the weights
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    assert same(timm_model("hf-hub:ann/photos", checkpoint=tmp_path / "own.safetensors"), model)
    weights = place / "snapshots" / ("0" * 40) / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(AdapterFileError, match=r"pytorch_model\.bin alone, a pickle.*nothing was read"):
        timm_model("hf-hub:ann/photos", pretrained=True)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"architecture": "test_vitt"}, "no model of timm .*Did you mean 'test_vit'"),
        ({"architecture": None}, "names no architecture"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path: is not taken from a file"),
        ({"model_args": {"pretrained_cfg": "x"}}, "pretrained_cfg: is not taken from a file"),
        ({"model_args": {"act_layer": {"_target_": "os.system"}}}, "act_layer: is not taken from a file"),
        ({"model_args": [1]}, "model_args are no mapping"),
        ({"pretrained_cfg": {"mean": {"a": 1}}}, "mean: is not taken"),
    ],
)
def test_what_a_file_may_not_say(saved, values, match):
    folder = saved[1]
    changed(folder, **values)
    with pytest.raises(AdapterFileError, match=match):
        timm_model(f"local-dir:{folder}", pretrained=True)


def test_folders_that_lack_something(saved, tmp_path):
    folder = saved[1]
    with pytest.raises(MissingFileError, match="there is no file"):
        timm_model(f"local-dir:{tmp_path / 'none'}")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(AdapterFileError, match="a pickle"):
        timm_model(f"local-dir:{folder}", pretrained=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        timm_model(f"local-dir:{folder}")
    with pytest.raises(ConfigError, match="hf-hub:USER/NAME"):
        timm_model("hf-hub:ann")


def test_a_configuration_without_end_is_damage(saved):
    _, folder = saved
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(AdapterFileError, match=r"config.json cannot be read"):
        timm_model(f"local-dir:{folder}")
