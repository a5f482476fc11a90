"""detector: torchvision's own models, whole or not at all, own classes, one message when offline."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights
from torchvision.ops.misc import FrozenBatchNorm2d

from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError
from lora_lightning.models.detection import SMALL, TORCHVISION, detector


def scene(size=128):
    generator = torch.Generator().manual_seed(0)
    images = list(torch.rand(2, 3, size, size, generator=generator))
    target = {"boxes": torch.tensor([[10.0, 12, 50, 60]]), "labels": torch.tensor([2])}
    return images, [target, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]


@pytest.mark.parametrize("name", SMALL)
def test_small_detectors_train_and_find(name):
    torch.manual_seed(0)
    model = detector(name, 4)
    losses = model(*scene())
    assert all(t.ndim == 0 and t.isfinite() for t in losses.values()) and len(losses) >= 3
    with torch.no_grad():
        (found, _) = model.eval()(scene()[0])
    assert {"boxes", "labels", "scores"} == set(found)
    assert 400_000 < sum(p.numel() for p in model.parameters()) < 700_000


def structure(model):
    return [(n, type(m), getattr(m, "eps", None)) for n, m in model.named_modules()]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if "fcos" in name or "320" in name else pytest.mark.slow)
        for name in TORCHVISION
    ],
)
def test_pretrained_models_are_torchvisions_own(name, tmp_path, monkeypatch):
    """Weights of COCO's 91 outputs in torch's cache: built as torchvision builds it, loaded whole."""
    torch.manual_seed(0)
    weights = get_model_weights(name).DEFAULT
    state = get_model_builder(name)(weights=None, weights_backbone=None, num_classes=91).state_dict()
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    torch.save(state, tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    wanted = get_model_builder(name)(weights=weights)
    found = detector(name, 90, pretrained=True)
    assert structure(found) == structure(wanted)
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_other_classes_keep_everything_but_the_layers_that_predict_them(tmp_path):
    torch.manual_seed(0)
    base = detector("fasterrcnn_small", 3)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model = detector("fasterrcnn_small", 5, checkpoint=str(tmp_path / "base.safetensors"))
    ours, theirs = model.state_dict(), base.state_dict()
    other = {n for n in ours if not (ours[n].shape == theirs[n].shape and torch.equal(ours[n], theirs[n]))}
    predictor = "roi_heads.box_predictor"
    assert other == {f"{predictor}.{n}" for n in (
        "cls_score.weight", "cls_score.bias", "bbox_pred.weight", "bbox_pred.bias")}  # fmt: skip
    assert model.roi_heads.box_predictor.cls_score.out_features == 6
    model(*scene())


def test_single_stage_heads_of_other_classes_work(tmp_path):
    """Their heads keep the number of classes in attributes of their own."""
    save_file(detector("fcos_small", 3).state_dict(), tmp_path / "base.safetensors")
    model = detector("fcos_small", 5, checkpoint=str(tmp_path / "base.safetensors"))
    model(*scene())
    assert model.eval()(scene()[0])[0]["boxes"].shape[1] == 4


def test_keys_of_a_lightning_module_fit(tmp_path):
    base = detector("fcos_small", 3)
    save_file({f"model.{n}": t for n, t in base.state_dict().items()}, tmp_path / "task.safetensors")
    model = detector("fcos_small", 3, checkpoint=str(tmp_path / "task.safetensors"))
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in model.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(detector("fcos_small", 3).state_dict(), tmp_path / "fcos.safetensors")
    with pytest.raises(AdapterFileError, match=r"does not fit fasterrcnn_small.*nothing was loaded"):
        detector("fasterrcnn_small", 3, checkpoint=str(tmp_path / "fcos.safetensors"))


@pytest.mark.parametrize("option", ["pretrained", "pretrained_backbone"])
def test_offline_one_message_says_what_goes_where(option, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("lora_lightning.utils.download.request_failure", lambda probe: "no route to host")
    with pytest.raises(MissingFileError) as caught:
        detector("fcos_resnet50_fpn", 2, **{option: True})
    message = str(caught.value)
    assert "no route to host" in message and f"copy it here as {tmp_path}/checkpoints/" in message
    assert ("fcos_resnet50_fpn_coco" in message) == (option == "pretrained")


def test_a_pretrained_backbone_is_loaded_and_its_norms_stay(tmp_path, monkeypatch):
    torch.manual_seed(0)
    from torchvision.models import ResNet50_Weights, resnet50

    state = resnet50().state_dict()
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / ResNet50_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    model = detector("fcos_resnet50_fpn", 2, pretrained_backbone=True)
    body = model.backbone.body
    assert torch.equal(body.layer3[2].conv2.weight, state["layer3.2.conv2.weight"])
    assert isinstance(body.bn1, FrozenBatchNorm2d)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_every_bad_option_is_named():
    with pytest.raises(ConfigError) as caught:
        detector("fcos_tiny", 0, pretrained=True, pretrained_backbone=True)
    message = str(caught.value)
    assert "Did you mean 'fcos_small'" in message and "num_classes=0" in message
    assert "give one of the two" in message
    with pytest.raises(ConfigError, match=r"score_tresh=0.1 .*Did you mean 'score_thresh'"):
        detector("fcos_small", 2, score_tresh=0.1)
