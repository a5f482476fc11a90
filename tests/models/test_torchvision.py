"""torchvision_model: names, heads whatever they are called, weights from torch's cache or a file, offline."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from lora_lightning.data.picture_transform import preprocessing_of
from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError
from lora_lightning.methods.optimizers import head_parameters
from lora_lightning.models.torchvision import NAMES, torchvision_model
from lora_lightning.planning.heads import find_heads

SMALL = "shufflenet_v2_x0_5"
# One of each family, with the name of its head.
HEADS = {
    "alexnet": "classifier.6", "convnext_tiny": "classifier.2", "densenet121": "classifier",
    "efficientnet_b0": "classifier.1", "efficientnet_v2_s": "classifier.1", "googlenet": "fc",
    "inception_v3": "fc", "maxvit_t": "classifier.5", "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1", "mobilenet_v3_small": "classifier.3", "regnet_y_400mf": "fc",
    "resnet18": "fc", "shufflenet_v2_x0_5": "fc", "squeezenet1_0": "classifier.1", "swin_t": "head",
    "vgg11": "classifier.6", "vit_b_32": "heads.head",
}  # fmt: skip
QUICK = ("googlenet", "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_0", "mobilenet_v3_small")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch's cache, empty, on a machine without a network."""

    def fail(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def made(name: str, seed: int = 5, **options):
    torch.manual_seed(seed)
    return models.get_model(name, weights=None, **options)


def put_in_cache(cache: Path, name: str, **options):
    model = made(name, **options)
    url = models.get_model_weights(name).DEFAULT.url
    torch.save(model.state_dict(), cache / url.rpartition("/")[2])
    return model


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HEADS]
)
def test_only_the_head_is_fresh_whatever_it_is_called(name, cache):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    source = put_in_cache(cache, name, **options).state_dict()
    model = torchvision_model(f"torchvision/{name}", pretrained=True, num_classes=3)
    assert find_heads(model) == [HEADS[name]]
    for tensor, value in model.state_dict().items():
        fresh = tensor.startswith(f"{HEADS[name]}.")
        assert fresh == (value.shape != source[tensor].shape), tensor
        begun = float(tensor.endswith("bias") and name.startswith("squeezenet"))  # before a ReLU
        assert (value == begun).all() if fresh else torch.equal(value, source[tensor]), tensor
    side = model.pretrained_cfg["input_size"][1]
    assert model.train()(torch.zeros(2, 3, side, side)).shape == (2, 3) == (2, model.num_classes)
    assert head_parameters(model) == set(model.get_submodule(HEADS[name]).parameters())


def test_every_classifier_of_torchvision_is_of_a_tested_family():
    families = {models.get_model_builder(name).__module__ for name in HEADS}
    assert {models.get_model_builder(name).__module__ for name in NAMES} == families


def test_own_head_and_pictures_as_the_weights_say(cache):
    source = put_in_cache(cache, SMALL)
    model = torchvision_model(SMALL, pretrained=True)
    assert model.num_classes == 1000
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in model.state_dict().items())
    transforms = models.get_model_weights(SMALL).DEFAULT.transforms()
    facts = preprocessing_of(model)
    assert list(facts["input_size"]) == [3, *transforms.crop_size * 2]
    assert (list(facts["mean"]), list(facts["std"])) == (transforms.mean, transforms.std)
    assert facts["interpolation"] == transforms.interpolation.value
    assert facts["crop_pct"] == transforms.crop_size[0] / transforms.resize_size[0]


@pytest.mark.parametrize(("classes", "prefix"), [(None, ""), (None, "model."), (2, "model.")])
def test_a_local_file(classes, prefix, tmp_path):
    source = made(SMALL, num_classes=5)
    save_file({f"{prefix}{n}": t for n, t in source.state_dict().items()}, tmp_path / "a.safetensors")
    model = torchvision_model(SMALL, checkpoint=tmp_path / "a.safetensors", num_classes=classes)
    assert model.num_classes == (classes or 5)
    assert torch.equal(model.conv5[0].weight, source.conv5[0].weight)
    assert torch.equal(model.fc.weight, source.fc.weight) == (classes is None)


@pytest.mark.slow
def test_a_vit_for_pictures_of_another_size(cache):
    put_in_cache(cache, "vit_b_32")
    model = torchvision_model("vit_b_32", pretrained=True, num_classes=2, image_size=64)
    assert model.encoder.pos_embedding.shape[1] == 5
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)


def test_offline_is_one_message(cache):
    with pytest.raises(MissingFileError, match=r"resnet50 are not on this machine.*Name or service") as error:
        torchvision_model("resnet50", pretrained=True, weights="IMAGENET1K_V1")
    url = models.ResNet50_Weights.IMAGENET1K_V1.url
    assert f"curl -LO {url}" in str(error.value)
    assert str(cache / url.rpartition("/")[2]) in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("resnet51", {}, "Did you mean 'resnet5"),
        ("fcn_resnet50", {}, "give a classifier of torchvision"),
        (
            "resnet18",
            {"weights": "IMAGENET1K_V2"},
            "resnet18 has IMAGENET1K_V1. Did you mean 'IMAGENET1K_V1'",
        ),
        ("resnet18", {"num_classes": 0}, "num_classes=0"),
        (SMALL, {"dropuot": 0.1}, "torchvision cannot build shufflenet_v2_x0_5 with dropuot=0.1: .*dropuot"),
    ],
)
def test_bad_names_and_options(name, options, match):
    with pytest.raises(ConfigError, match=match):
        torchvision_model(name, **options)


def test_weights_of_another_model_and_pickles_are_refused(tmp_path):
    save_file(made("squeezenet1_1").state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=f"does not fit {SMALL}"):
        torchvision_model(SMALL, checkpoint=tmp_path / "a.safetensors")
    torch.save({}, tmp_path / "a.pth")
    with pytest.raises(AdapterFileError, match="nothing was read"):
        torchvision_model(SMALL, checkpoint=tmp_path / "a.pth")


def test_a_fresh_head_before_a_relu_learns(tmp_path):
    save_file(made("squeezenet1_1").state_dict(), tmp_path / "w.safetensors")
    model = torchvision_model("squeezenet1_1", checkpoint=tmp_path / "w.safetensors", num_classes=3)
    logits = model.eval()(torch.rand(2, 3, 48, 48))
    assert torch.equal(logits, torch.ones(2, 3))  # all classes alike
    logits.logsumexp(1).sum().backward()
    assert all(model.classifier[1].weight.grad.flatten(1).any(1))  # of each class
