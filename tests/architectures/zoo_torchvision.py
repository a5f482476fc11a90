"""Architectures of torchvision, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import Architecture, held, images


def _vision_resnet(width: int = 16, **options: Any) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, **options)


def _bottlenecks(**options: Any) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=8, **options)


def _vision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)


def _vision_swin(version: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import swin_transformer as swin

        parts = {}
        if version == 2:
            parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5, **parts)

    return build


def _swin3d() -> nn.Module:
    from torchvision.models.video import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], num_classes=5)


def _vision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt(
        [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 1)], num_classes=5
    )


def _vision_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return build


def _fpn() -> nn.Module:
    """A small ResNet with a feature pyramid, as `resnet_fpn_backbone` makes it."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    body = _vision_resnet()
    layers = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
    return BackboneWithFPN(body, layers, [64, 128, 256, 512], 32)


def _detector(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import detection

        sizes = {"min_size": 64, "max_size": 96}
        if name in ("RetinaNet", "FCOS"):
            from torchvision.models.detection.anchor_utils import AnchorGenerator

            ratios = (0.5, 1.0, 2.0) if name == "RetinaNet" else (1.0,)
            anchors = AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), (ratios,) * 5)
            return getattr(detection, name)(
                _fpn(), num_classes=3, anchor_generator=anchors, score_thresh=0.0, **sizes
            )
        options: dict[str, Any] = {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20}
        options.update(rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=20, box_score_thresh=0.0)
        if name == "KeypointRCNN":
            options["num_keypoints"] = 4
        return getattr(detection, name)(_fpn(), num_classes=3, **sizes, **options)

    return build


def _ssd(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import detection

        return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, score_thresh=0.0)

    return build


def scenes(train: bool, size: int = 64) -> Callable[[], Any]:
    """Two images, in train mode with a box, its mask and its keypoints each."""

    def batch() -> Any:
        pictures = [torch.rand(3, size, size) for _ in range(2)]
        if not train:
            return (pictures,)
        mask = torch.zeros(1, size, size, dtype=torch.uint8)
        mask[:, 10:50, 8:40] = 1
        target = {
            "boxes": torch.tensor([[8.0, 10.0, 40.0, 50.0]]),
            "labels": torch.tensor([1]),
            "masks": mask,
            "keypoints": torch.tensor(
                [[[12.0, 12.0, 1.0], [30.0, 40.0, 1.0], [20.0, 20.0, 1.0], [9, 45, 1]]]
            ),
        }
        return pictures, [target, {k: v.clone() for k, v in target.items()}]

    return batch


def detector(build: Callable[[], nn.Module]) -> dict[str, Any]:
    """With the whole detector as the backbone: what a LightningModule sees that holds it as `self.model`."""
    return {"build": held(build), "batch": scenes(False), "train_batch": scenes(True)}


_DISCRETE = {"autocast": "which boxes are kept is discrete, so that rounding changes their number"}
_FINEST = {
    f"fpn.layer_blocks.{i}": "small boxes are pooled from the finest level; this one serves the RPN"
    for i in (1, 2, 3)
}
_TWO_STAGE: dict[str, Any] = {
    "dead_in_eval": _FINEST,
    "impossible": _DISCRETE,
}
_AUX = {"aux": "the auxiliary classifiers run in training alone"}
_COARSE_SSD = {"backbone.extra": "no box matches an anchor of the coarsest maps, and none is kept from them"}
_COARSE = {"dead_in_train": _COARSE_SSD, "dead_in_eval": _COARSE_SSD}


def _deeplab() -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
    from torchvision.models.segmentation.fcn import FCNHead

    body = _bottlenecks(replace_stride_with_dilation=[False, True, True])
    body = IntermediateLayerGetter(body, {"layer4": "out", "layer3": "aux"})
    return DeepLabV3(body, DeepLabHead(2048, 5, (2, 4)), FCNHead(1024, 5))


def _video_resnet() -> nn.Module:
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    return VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=5)


def videos() -> Any:
    return (torch.rand(2, 3, 4, 32, 32),)


TORCHVISION = {
    "tv_vit": Architecture(_vision_vit, images(16), quick=True),
    "tv_swin": Architecture(_vision_swin(1), images(), quick=True),
    "tv_swin_v2": Architecture(_vision_swin(2), images()),
    "tv_resnet": Architecture(_bottlenecks, images(64)),
    "tv_resnext": Architecture(lambda: _bottlenecks(groups=4), images(64)),
    "tv_convnext": Architecture(_vision_convnext, images(64)),
    "tv_efficientnet": Architecture(_vision_model("efficientnet_b0", num_classes=5), images(64)),
    "tv_mobilenet_v3": Architecture(_vision_model("mobilenet_v3_small", num_classes=5), images(64)),
    "tv_regnet": Architecture(_vision_model("regnet_y_400mf", num_classes=5), images(64)),
    "tv_densenet": Architecture(_vision_model("densenet121", num_classes=5), images(64)),
    "tv_googlenet": Architecture(
        _vision_model("googlenet", num_classes=5, init_weights=False),
        images(64),
        dead_in_eval={"aux": "the auxiliary classifiers run in training alone"},
    ),
    "tv_squeezenet": Architecture(_vision_model("squeezenet1_1", num_classes=5), images(64)),
    "tv_vgg": Architecture(_vision_model("vgg11", num_classes=5), images(64), large=True),
    "tv_fasterrcnn": Architecture(**detector(_detector("FasterRCNN")), **_TWO_STAGE, quick=True),
    "tv_maskrcnn": Architecture(**detector(_detector("MaskRCNN")), **_TWO_STAGE),
    "tv_keypointrcnn": Architecture(**detector(_detector("KeypointRCNN")), **_TWO_STAGE),
    "tv_retinanet": Architecture(**detector(_detector("RetinaNet"))),
    "tv_fcos": Architecture(**detector(_detector("FCOS"))),
    "tv_ssd": Architecture(
        **detector(_ssd("ssd300_vgg16")), dead_in_train=_COARSE_SSD, dead_in_eval=_COARSE_SSD
    ),
    "tv_ssdlite": Architecture(
        **detector(_ssd("ssdlite320_mobilenet_v3_large")),
        impossible=_DISCRETE,
        dead_in_train=_COARSE_SSD,
    ),
    "tv_fasterrcnn_by_backbone": Architecture(
        _detector("FasterRCNN"), scenes(False), scenes(True), dead_in_eval=_FINEST, impossible=_DISCRETE
    ),
    "tv_deeplabv3": Architecture(held(_deeplab), images(64)),
    "tv_lraspp": Architecture(
        held(_vision_model("lraspp_mobilenet_v3_large", num_classes=5, weights_backbone=None)), images(64)
    ),
    "tv_r3d": Architecture(_video_resnet, videos, quick=True),
    "tv_swin3d": Architecture(_swin3d, videos),
}
