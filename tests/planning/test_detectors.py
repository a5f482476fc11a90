"""LoRA on detectors: which parts are adapted, what trains beside, and that merging changes no box."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.misc import FrozenBatchNorm2d

import lora_lightning as ll
from lora_lightning.errors import ConfigError
from lora_lightning.models.detection import SMALL, detector
from lora_lightning.planning.detectors import detectors


class ViTDet(nn.Module):
    """A plain vision transformer and the simple feature pyramid of ViTDet (Li et al. 2022): strides 8 and
    16 from its last tokens."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.net = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=64,
            patch_size=16,
            embed_dim=48,
            depth=2,
            num_heads=2,
            num_classes=0,
        )
        self.fpn = nn.ModuleList([nn.ConvTranspose2d(48, 32, 2, 2), nn.Conv2d(48, 32, 1)])

    def forward(self, x):
        tokens = self.net.forward_features(x)[:, 1:]
        grid = tokens.transpose(1, 2).unflatten(2, (4, 4))
        return OrderedDict((str(i), layer(grid)) for i, layer in enumerate(self.fpn))


def vitdet():
    anchors = AnchorGenerator(((12, 24), (32, 48)), ((1.0,),) * 2)
    pool = MultiScaleRoIAlign(["0", "1"], 4, 1)
    sizes = {"min_size": 64, "max_size": 64, "fixed_size": (64, 64)}
    return FasterRCNN(
        ViTDet(), 4, rpn_anchor_generator=anchors, box_roi_pool=pool, box_score_thresh=0.0, **sizes
    )


def scene(side=64):
    generator = torch.Generator().manual_seed(0)
    images = list(torch.rand(2, 3, side, side, generator=generator))
    target = {"boxes": torch.tensor([[8.0, 8, 30, 34], [20, 30, 50, 60]]), "labels": torch.tensor([1, 2])}
    return images, [target, {n: t.clone() for n, t in target.items()}]


def adapted_names(model, **config):
    return {p.name for p in ll.plan(model, ll.LoRAConfig(rank=4, **config)).layers}


@pytest.mark.parametrize("name", SMALL)
def test_auto_adapts_backbone_and_pyramid_and_trains_what_predicts(name):
    model = detector(name, 3)
    plan = ll.plan(model)
    convolutions = {n for n, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d)}
    assert {p.name for p in plan.layers} == {f"backbone.{n}" for n in convolutions - {"body.stem.0"}}
    predicting = {"fcos_small": {"cls_logits", "bbox_reg", "bbox_ctrness"}}.get(
        name, {"cls_logits", "bbox_pred", "box_predictor"}
    )
    assert {head.rpartition(".")[2] for head in plan.heads} == predicting
    assert any("outside detector_part=neck" in reason for reason in plan.skipped.values())


def test_scopes_are_nested():
    model = detector("fasterrcnn_small", 3)
    backbone, neck, every = (adapted_names(model, detector_part=s) for s in ("backbone", "neck", "all"))
    assert backbone < neck < every
    assert all(n.startswith("backbone.body.") for n in backbone)
    assert {n.split(".")[1] for n in neck - backbone} == {"fpn"}
    assert {n.split(".")[0] for n in every - neck} == {"rpn", "roi_heads"}
    assert neck == adapted_names(model)


def test_scope_confines_patterns_too():
    model = detector("fasterrcnn_small", 3)
    assert adapted_names(model, target_modules="all", detector_part="neck") - adapted_names(model) == {
        "backbone.body.stem.0"
    }
    assert adapted_names(model, target_modules=["*.0.0"]) == {
        "backbone.fpn.inner_blocks.0.0", "backbone.fpn.layer_blocks.0.0", "rpn.head.conv.0.0",
    }, "a pattern means what it says"  # fmt: skip
    assert "rpn.head.conv.0.0" not in adapted_names(model, target_modules=["*.0.0"], detector_part="neck")


def test_scope_is_for_detectors():
    with pytest.raises(ConfigError, match=r"detector_part='neck': ResNet is no detector.*detector_part=null"):
        ll.plan(timm.create_model("resnet10t"), ll.LoRAConfig(detector_part="neck"))
    with pytest.raises(ConfigError, match=r"detector_part='nek'.*Did you mean 'neck'"):
        ll.LoRAConfig(detector_part="nek")


def test_a_detr_is_a_detector_whose_neck_is_its_encoder():
    parts = {n: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for n in ("backbone", "encoder", "decoder")}
    model = nn.ModuleDict({"model": nn.Module()})
    for name, part in {**parts, "encoder_input_proj": nn.Linear(8, 8)}.items():
        model["model"].add_module(name, part)
    assert detectors(model) == ["model"]
    found = {n.split(".")[1] for n in adapted_names(model, detector_part="neck", modules_to_save=None)}
    assert found == {"backbone", "encoder", "encoder_input_proj"}
    found = {n.split(".")[1] for n in adapted_names(model, modules_to_save=None)}
    assert "decoder" in found, "auto adapts all of it"


def test_vit_backbones_are_adapted_from_the_first_block_on():
    names = adapted_names(vitdet(), detector_part="neck")
    assert names == {
        *(
            f"backbone.net.blocks.{i}.{n}"
            for i in (0, 1)
            for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ),
        "backbone.fpn.0",
        "backbone.fpn.1",
    }
    assert adapted_names(vitdet(), detector_part="backbone") == {n for n in names if ".net." in n}


def small(name, **options):
    return lambda: detector(name, 3, min_size=64, max_size=64, **options)


BUILDS = {
    "fcos": small("fcos_small", score_thresh=0.0),
    "fasterrcnn": small("fasterrcnn_small", box_score_thresh=0.0),
    "vitdet": vitdet,
}


def trained(build, **config):
    """A detector after a few steps, its updates no longer zero."""
    torch.manual_seed(0)
    model = build()
    ll.inject(model, ll.LoRAConfig(rank=4, **config))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sum(model.train()(*scene()).values()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("build", BUILDS)
def test_every_update_learns_in_scope_all_and_nothing_else_moves(build):
    torch.manual_seed(0)
    before = {n: t.clone() for n, t in BUILDS[build]().state_dict().items()}
    model = trained(BUILDS[build], detector_part="all")
    updates = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    still = {n for n, p in updates.items() if not p.any()}
    assert len(updates) > 9 and not still
    heads = ll.plan(BUILDS[build](), ll.LoRAConfig(rank=4, detector_part="all")).heads
    moved = {n for n, t in model.state_dict().items() if n in before and not torch.equal(t, before[n])}
    assert moved and all(any(n.startswith(f"{head}.") for head in heads) for n in moved)
    ll.eject(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("build", BUILDS)
def test_the_merged_detector_finds_the_same_boxes(build):
    model = trained(BUILDS[build], detector_part="all")
    with torch.no_grad():
        adapted = model(scene()[0])
        ll.merge(model)
        merged = model(scene()[0])
        with ll.adapters_off(model):
            base = model(scene()[0])
    for ours, theirs in zip(merged, adapted, strict=True):
        assert len(ours["boxes"]) and torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base[0]["scores"][:5], merged[0]["scores"][:5], atol=1e-4)


def test_frozen_batch_norms_are_left_as_they_are():
    model = detector("fcos_small", 3)
    for parent in list(model.backbone.body.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, FrozenBatchNorm2d(norm.num_features))
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    ll.inject(model, ll.LoRAConfig(rank=4, train_norm="both"))
    assert kinds and kinds == {n: type(model.get_submodule(n)) for n in kinds}
    sum(model.train()(*scene(128)).values()).backward()
