"""segmenter and timm_segmenter: others' own models and weights, own classes, and LoRA on each of them."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError
from lora_lightning.models.segmentation import CLASS_LAYERS, TORCHVISION, segmenter
from lora_lightning.models.timm import timm_model
from lora_lightning.models.timm_segmentation import timm_segmenter
from lora_lightning.tasks.segmentation import SemanticSegmenter

QUICK = "lraspp_mobilenet_v3_large"
# One of each kind of backbone that timm has: a pyramid, a transformer of one stride, windows in NHWC.
TIMM = {
    "resnet10t": {"zero_init_last": False},  # a gate of zero would hide what lies behind it
    "vit_tiny_patch16_224": {"embed_dim": 48, "num_heads": 2, "depth": 4},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": [1, 1, 1, 1]},
    "convnext_atto": {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
}
EACH = [
    *(pytest.param(name, id=name, marks=() if name == QUICK else pytest.mark.slow) for name in TORCHVISION),
    *(pytest.param(name, id=name, marks=() if "vit" in name else pytest.mark.slow) for name in TIMM),
]


def built(name, classes=3, **options):
    torch.manual_seed(0)
    if name in TORCHVISION:
        return segmenter(name, classes, **options)
    return timm_segmenter(name, classes, head_width=16, **TIMM[name], **options)


def pictures(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", EACH)
def test_lora_on_each_model(name):
    """Nothing changes at injection; backbone and head train; merged is the same; ejected is the base."""
    task = SemanticSegmenter(built(name), 3).double()
    images, truth = pictures(64, 80).double(), torch.randint(0, 3, (2, 64, 80))
    for norm in task.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        task.train().model(images)  # statistics that normalize, as pretrained ones do
        before = task.eval().model(images)
    assert before["out"].shape == (2, 3, 64, 80)
    plan = ll.inject(task, ll.LoRAConfig(rank=2))
    assert plan.heads and all("backbone" not in head for head in plan.heads)
    assert sum("backbone" in layer.name for layer in plan.layers) > 10
    with torch.no_grad():
        after = task.model(images)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    task.train()
    frozen = {n: t.clone() for n, t in task.state_dict().items() if "lora_" not in n}
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(out, truth) for out in task.model(images).values())
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    changed = {n for n, t in task.state_dict().items() if n in frozen and not torch.equal(t, frozen[n])}
    assert changed and all(n.startswith(tuple(plan.heads)) for n in changed), "norms are frozen, too"
    task.eval()
    with torch.no_grad():
        apart = task.model(images)["out"]
        assert apart.isfinite().all() and not torch.equal(apart, before["out"])
        ll.merge(task)
        together = task.model(images)["out"]
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9 * float(apart.abs().max()))
        ll.eject(task)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == QUICK else pytest.mark.slow) for n in TORCHVISION]
)
def test_pretrained_models_are_torchvisions_own(name, tmp_path, monkeypatch):
    """Weights of 21 classes in torch's cache: built as torchvision builds it, loaded whole."""
    torch.manual_seed(0)
    weights = get_model_weights(name).DEFAULT
    aux = {} if "lraspp" in name else {"aux_loss": True}
    state = get_model_builder(name)(weights=None, weights_backbone=None, num_classes=21, **aux).state_dict()
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    torch.save(state, tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    wanted = get_model_builder(name)(weights=weights).state_dict()
    found = segmenter(name, 21, pretrained=True).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())
    other = segmenter(name, 4, pretrained=True).state_dict()
    fresh = {n for n, t in other.items() if t.shape != wanted[n].shape}
    assert {n.rpartition(".")[0] for n in fresh} <= set(CLASS_LAYERS) and fresh
    kept = {n for n in other if n.rpartition(".")[0] not in CLASS_LAYERS}
    assert all(torch.equal(other[n], wanted[n]) for n in kept)
    if aux:
        alone = segmenter(name, 21, pretrained=True, aux_loss=False).state_dict()
        assert not any("aux" in n for n in alone) and all(torch.equal(alone[n], wanted[n]) for n in alone)


def test_on_a_pretrained_backbone_the_whole_head_trains(tmp_path, monkeypatch):
    from torchvision.models import mobilenet_v3_large

    torch.manual_seed(1)
    state = mobilenet_v3_large(weights=None).state_dict()
    for tensor in state.values():
        tensor.add_(1)
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    torch.save(state, tmp_path / "checkpoints" / "mobilenet_v3_large-8738ca79.pth")
    model = segmenter(QUICK, 3, pretrained="backbone")
    assert torch.equal(model.backbone["0"][0].weight, state["features.0.0.weight"])
    plan = ll.plan(SemanticSegmenter(model, 3))
    assert plan.heads == ["model.classifier"] and all("backbone" in layer.name for layer in plan.layers)


def test_what_is_missing_or_wrong_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingFileError, match=r"lraspp_mobilenet_v3_large-d234d4ea\.pth"):
        segmenter(QUICK, 3, pretrained=True)
    with pytest.raises(MissingFileError, match=r"(?s)backbone.*mobilenet_v3_large-8738ca79\.pth"):
        segmenter(QUICK, 3, pretrained="backbone")
    with pytest.raises(ConfigError, match=r"name='deeplabv3_resnet5': .*Did you mean 'deeplabv3_resnet50'"):
        segmenter("deeplabv3_resnet5", 3)
    with pytest.raises(ConfigError, match="pretrained='coco': give true, backbone"):
        segmenter(QUICK, 3, pretrained="coco")
    save_file(nn.Linear(3, 3).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(AdapterFileError, match="does not fit lraspp_mobilenet_v3_large as it was built"):
        segmenter(QUICK, 3, checkpoint=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if "vit" in n else pytest.mark.slow) for n in TIMM]
)
def test_a_timm_backbone_has_its_weights_in_its_levels(name, tmp_path):
    torch.manual_seed(3)
    flexible = {"swin": {"strict_img_size": False}, "vit_": {"dynamic_img_size": True}}
    options = {**TIMM[name], **flexible.get(name[:4], {})}
    whole = timm_model(name, num_classes=5, **options)
    save_file(whole.state_dict(), tmp_path / "backbone.safetensors")
    model = built(name, checkpoint=str(tmp_path / "backbone.safetensors"))
    stored = {key.replace(".", "_"): tensor for key, tensor in whole.state_dict().items()}
    for key, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, stored[key.replace(".", "_").removeprefix("model_")]), key
    images = pictures(64, 96)
    with torch.no_grad():
        levels = whole.eval().forward_intermediates(images, indices=4, intermediates_only=True)
        found = model.backbone.eval()(images)
    if model.channels_last:
        found = [x.permute(0, 3, 1, 2) for x in found]
    for one, other in zip(found, levels, strict=True):
        torch.testing.assert_close(one, other)
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    again = built(name, classes=4, checkpoint=str(tmp_path / "whole.safetensors")).state_dict()
    same = {n for n, t in model.state_dict().items() if torch.equal(t, again[n]) or t.shape != again[n].shape}
    assert same == set(again) and again["head.classifier.weight"].shape[0] == 4


def test_pictures_of_any_size_and_backbones_that_cannot():
    model = built("vit_tiny_patch16_224").eval()
    with torch.no_grad():
        assert model(pictures(37, 51))["out"].shape == (2, 3, 37, 51)
    assert built("vit_tiny_patch16_224").head.classifier.out_channels == 3
    with pytest.raises(ConfigError, match=r"name='mixer_s32_224': does not take pictures of any size"):
        timm_segmenter("mixer_s32_224", 3)
    with pytest.raises(ConfigError, match="wrong=3 is not an option of resnet10t"):
        timm_segmenter("resnet10t", 3, wrong=3)
    with pytest.raises(ConfigError, match="Did you mean 'resnet18'"):
        timm_segmenter("resnet81", 3)


def test_timm_reads_no_weights_by_itself(tmp_path):
    """Which would be unpickled by some of its versions, and not checked by any."""
    state = timm_model("resnet10t", num_classes=0).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"checkpoint_path=.*: give checkpoint=file.safetensors"):
        timm_segmenter("resnet10t", 3, checkpoint_path=str(tmp_path / "w.pth"))
