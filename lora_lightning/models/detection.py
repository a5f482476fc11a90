"""detector: torchvision's detectors by name, and two small ones, with weights from a file or torchvision."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lora_lightning.files.weights import load_into, network_state
from lora_lightning.models.base_file import Weights, base_file, read_base
from lora_lightning.models.torchvision_weights import backbone_weights
from lora_lightning.utils.checks import require, strays
from lora_lightning.utils.download import DOWNLOAD_AGAIN, url_file
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import at_least, one_of
from lora_lightning.utils.torch_file import read_torch

with loading("torchvision"):
    from torchvision.models import get_model_builder, get_model_weights
    from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.fcos import FCOSHead
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.resnet import BasicBlock
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.misc import FrozenBatchNorm2d

State = Mapping[str, Tensor]

# torchvision's detectors; with the eps of the frozen norms where its trained weights have these.
TORCHVISION: dict[str, float | None] = {
    "fasterrcnn_resnet50_fpn": 0.0,
    "fasterrcnn_resnet50_fpn_v2": None,
    "fasterrcnn_mobilenet_v3_large_fpn": 1e-5,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 1e-5,
    "retinanet_resnet50_fpn": 0.0,
    "retinanet_resnet50_fpn_v2": None,
    "fcos_resnet50_fpn": 1e-5,
    "ssd300_vgg16": None,
    "ssdlite320_mobilenet_v3_large": None,
    "maskrcnn_resnet50_fpn": 0.0,
    "maskrcnn_resnet50_fpn_v2": None,
}
KINDS = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN, "retinanet": RetinaNet, "fcos": FCOS, "ssd": SSD}
# The layers whose outputs are so many for each class.
CLASS_LAYERS = (
    "roi_heads.box_predictor.cls_score.weight",
    "head.classification_head.cls_logits.weight",
    "head.classification_head.module_list.0.weight",
    "head.classification_head.module_list.0.1.weight",
)
WIDTHS = (24, 32, 64, 96)  # channels of the small detectors' stem and stages
NECK = 64  # channels of their feature pyramid


def detector(
    name: Annotated[str, one_of(*SMALL, *TORCHVISION)],
    num_classes: Annotated[int, at_least(1)],
    *,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    checkpoint: Weights = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a detector: in train mode (images, targets) -> a dict of losses, in eval mode images -> a list
    of dicts `boxes`, `labels`, `scores` (and `masks`), images being tensors (3, height, width) in [0, 1].

    Where the weights were made for other classes, the layers that predict classes are fresh ones, and the
    rest is loaded whole or not at all.

    Args:
        name: `fasterrcnn_small` or `fcos_small` (about 0.5 million parameters, for images of about 128
            pixels), or a name of torchvision's: `fasterrcnn_resnet50_fpn`, `maskrcnn_resnet50_fpn_v2`, …
        num_classes: how many classes there are, the background not counted: labels are 1 … num_classes.
        pretrained: load torchvision's weights, trained on COCO (its 90 category numbers are the labels),
            from torch's cache or the internet.
        pretrained_backbone: load torchvision's ImageNet weights into the backbone instead.
        checkpoint: a .safetensors file, or the bare name of weights shipped in the package
            (`fcos_shapes`); it takes the place of both. Keys may carry the `model.` of a LightningModule.
        **kwargs: the model's own options (`min_size`, `max_size`, `box_score_thresh`, …).

    Raises:
        ConfigError: an unknown name, or bad options.
        MissingFileError: weights that are not on this machine and cannot be downloaded now.
        AdapterFileError: a checkpoint that is pickled, damaged, or made for another model.
    """
    kwargs = {key: tuple(v) if isinstance(v, list) else v for key, v in kwargs.items() if v is not None}
    require(detector, locals(), _apart(name, pretrained, pretrained_backbone, kwargs))
    if checkpoint is not None:
        path = base_file(checkpoint)
        return _loaded(name, num_classes, read_base(path), path, kwargs)
    if pretrained:
        path = url_file(name, get_model_weights(name).DEFAULT.url)
        return _loaded(name, num_classes, read_torch(path, DOWNLOAD_AGAIN), path, kwargs)
    if pretrained_backbone:
        return _build(name, num_classes, kwargs, weights_backbone=backbone_weights(name))
    return _build(name, num_classes, kwargs)


def _apart(
    name: Any, pretrained: bool, pretrained_backbone: bool, kwargs: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong in options taken together."""
    for option, given in (("pretrained", pretrained), ("pretrained_backbone", pretrained_backbone)):
        if given and name in SMALL:
            yield f"{option}=True: {name} has no weights of torchvision; give checkpoint=NAME."
    if pretrained and pretrained_backbone:
        yield "pretrained_backbone=True: pretrained=True brings the backbone; give one of the two."
    for kind in (kind for prefix, kind in KINDS.items() if str(name).startswith(prefix)):
        options = [o for o in inspect.signature(kind).parameters if o not in ("backbone", "kwargs")]
        yield from strays(kwargs, options, name)


def _build(name: str, num_classes: int, kwargs: Mapping[str, Any], **weights: Any) -> nn.Module:
    """With random weights, or in its backbone those that torchvision is told to load."""
    build: Callable[..., nn.Module]
    if name in SMALL:
        build = SMALL[name]
    else:
        build = partial(get_model_builder(name), weights=None, **{"weights_backbone": None, **weights})
    return build(num_classes=num_classes + 1, **kwargs)  # and the background


def _loaded(name: str, num_classes: int, state: State, path: Path, kwargs: Mapping[str, Any]) -> nn.Module:
    model = trained_form(name, _build(name, num_classes, kwargs))
    state, ours = network_state(model, state), model.state_dict()
    fresh: list[str] = []
    if 0 < (classes := _classes_of(ours, state, num_classes)) != num_classes:
        with torch.device("meta"):
            theirs = trained_form(name, _build(name, classes, kwargs)).state_dict()
        fresh = [n for n, t in ours.items() if theirs[n].shape != t.shape]
    load_into(model, state, path, f"{name} as it was built", "Give the weights of this model.", fresh)
    return model


def _classes_of(ours: State, state: State, num_classes: int) -> int:
    """How many classes a state was made for, read off the layer that predicts them."""
    for layer in CLASS_LAYERS:
        if layer in ours and layer in state:
            return len(state[layer]) * (num_classes + 1) // len(ours[layer]) - 1
    return num_classes


def trained_form(name: str, model: nn.Module) -> nn.Module:
    """With frozen norms where torchvision builds its trained models so."""
    eps = TORCHVISION.get(name)
    if eps is not None:
        for parent in list(model.modules()):
            for child, norm in list(parent.named_children()):
                if type(norm) is nn.BatchNorm2d:
                    setattr(parent, child, FrozenBatchNorm2d(norm.num_features, eps))
    return model


def small_backbone() -> BackboneWithFPN:
    """Four small stages of a ResNet, the last two of strides 8 and 16 in a feature pyramid of 64 channels
    with a third level on top."""

    def stage(narrow: int, wide: int) -> nn.Module:
        shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, 2, bias=False), nn.BatchNorm2d(wide))
        return nn.Sequential(BasicBlock(narrow, wide, 2, shortcut))

    first = WIDTHS[0]
    stem = nn.Sequential(nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
    stages = [stage(narrow, wide) for narrow, wide in pairwise(WIDTHS)]
    body = nn.Sequential(OrderedDict(stem=stem, layer1=stages[0], layer2=stages[1], layer3=stages[2]))
    return BackboneWithFPN(body, {"layer2": "0", "layer3": "1"}, list(WIDTHS[2:]), NECK)


def fcos_small(num_classes: int, min_size: int = 128, max_size: int = 128, **kwargs: Any) -> FCOS:
    """torchvision's FCOS on `small_backbone`, with towers of two convolutions."""
    options = {"score_thresh": 0.05, "detections_per_img": 40, "topk_candidates": 300, **kwargs}
    return FCOS(
        small_backbone(),
        num_classes,
        min_size=min_size,
        max_size=max_size,
        image_mean=[0.45] * 3,
        image_std=[0.25] * 3,
        anchor_generator=AnchorGenerator(((4,), (8,), (16,)), ((1.0,),) * 3),
        head=FCOSHead(NECK, 1, num_classes, num_convs=2),
        **options,
    )


def fasterrcnn_small(num_classes: int, min_size: int = 128, max_size: int = 128, **kwargs: Any) -> FasterRCNN:
    """torchvision's Faster R-CNN on `small_backbone`, its boxes pooled to 5 × 5."""
    options = {
        "rpn_pre_nms_top_n_train": 300, "rpn_post_nms_top_n_train": 100,
        "rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 60,
        "box_batch_size_per_image": 32, "box_detections_per_img": 40, **kwargs,
    }  # fmt: skip
    anchors = AnchorGenerator(((12, 20), (32, 48), (72, 96)), ((1.0,),) * 3)
    return FasterRCNN(
        small_backbone(),
        min_size=min_size,
        max_size=max_size,
        image_mean=[0.45] * 3,
        image_std=[0.25] * 3,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(NECK, 2),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 5, 1, canonical_scale=32, canonical_level=3),
        box_head=TwoMLPHead(NECK * 25, 128),
        box_predictor=FastRCNNPredictor(128, num_classes),
        **options,
    )


SMALL: dict[str, Callable[..., nn.Module]] = {"fcos_small": fcos_small, "fasterrcnn_small": fasterrcnn_small}
