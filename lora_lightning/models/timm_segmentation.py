"""timm_segmenter: any timm model that takes pictures of any size, with SegFormer's light head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.errors import ConfigError, UserError
from lora_lightning.files.weights import load_into, network_state
from lora_lightning.models.base_file import Weights, base_file, read_base
from lora_lightning.models.timm import NAME, pickle_problem, plain_name, plain_options, timm_model
from lora_lightning.utils.checks import require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import at_least
from lora_lightning.utils.tables import truncate_list

with loading("timm"):
    import timm

LEVELS = (-4, -3, -2, -1)  # strides 4 to 32 of a pyramid, the last four blocks of a ViT (as DINOv2's probe)
FLEXIBLE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
PROBE = (96, 128)  # height and width of the picture by which a backbone shows that it takes any size
CLASSIFIER = "head.classifier"


class AllMLPHead(nn.Module):
    """SegFormer's decoder (Xie et al. 2021, arXiv 2105.15203): every level is projected to one width, brought
    to the first one's size and fused: features -> logits (batch, num_classes, height, width) of that size.

    Args:
        channels: of each level.
        width: to which they are projected.
        dropout: of whole channels before the classifier, in training.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = nn.Conv2d(width * len(channels), width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        levels = [
            F.interpolate(project(x), size, mode="bilinear", align_corners=False)
            for project, x in zip(self.projections, features, strict=True)
        ]
        # (batch, levels * width, height, width) -> (batch, width, height, width)
        fused = F.relu(self.norm(self.fuse(torch.cat(levels, 1))))
        return self.classifier(self.dropout(fused))


class TimmSegmenter(nn.Module):
    """Features of a timm model and a head: images (batch, 3, height, width) -> a dict with the logits `out`
    (batch, num_classes, height, width), as torchvision's segmentation models give them.

    Args:
        backbone: of timm's `features_only`.
        head: features -> logits.
        multiple: a picture is padded at its right and lower edge to multiples of this, in pixels.
    """

    def __init__(self, backbone: nn.Module, head: AllMLPHead, multiple: int) -> None:
        super().__init__()
        self.backbone, self.head, self.multiple = backbone, head, multiple
        self.channels_last = "NHWC" in str(getattr(backbone, "output_fmt", ""))

    def get_classifier(self) -> nn.Module:
        """The whole head is new, for `planning.heads` to find."""
        return self.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        features = list(self.backbone(padded))
        if self.channels_last:
            features = [x.permute(0, 3, 1, 2) for x in features]
        logits = F.interpolate(self.head(features), padded.shape[-2:], mode="bilinear", align_corners=False)
        return {"out": logits[..., :height, :width]}


def timm_segmenter(
    name: Annotated[str, NAME],
    num_classes: Annotated[int, at_least(1)],
    *,
    pretrained: bool = False,
    checkpoint: Weights = None,
    head_width: Annotated[int, at_least(8)] = 256,
    dropout: Annotated[float, at_least(0, below=1)] = 0.1,
    **kwargs: Any,
) -> nn.Module:
    """Build a segmentation model on a timm backbone, a convolutional network or a transformer: images of any
    size, normalized as the backbone's -> a dict with the logits `out` (batch, num_classes, height, width).

    The head is new and trains in full under LoRA.

    Args:
        name: as of `timm_model`.
        num_classes: how many classes there are, the background counted if it is one.
        pretrained: load timm's weights for this name into the backbone, from the local cache or the hub.
        checkpoint: a .safetensors file of the backbone as timm has it, or of the whole model; it takes
            the place of `pretrained`. Keys may carry the `model.` of a LightningModule.
        head_width: channels of the head.
        dropout: of the head's channels, in training.
        **kwargs: the backbone's other options (`drop_path_rate`, `depth`, …). One that is null is the
            default.

    Raises:
        ConfigError: an unknown name or tag, bad options, or a backbone that takes pictures of one size alone.
        MissingFileError: weights that are not on this machine and cannot be downloaded now.
        AdapterFileError: a checkpoint that is pickled, damaged, or made for another model.
    """
    name = plain_name(name)
    require(timm_segmenter, locals(), [pickle_problem(kwargs)])
    given = plain_options(kwargs)
    backbone, options = _features(name, given)
    info = backbone.feature_info
    multiple = max(info.reduction()) if _has_patches(backbone) else 1
    head = AllMLPHead(info.channels(), num_classes, head_width, dropout)
    model = TimmSegmenter(backbone, head, multiple)
    _refuse_one_size(name, model)
    if checkpoint is not None:
        path = base_file(checkpoint)
        state = network_state(model, read_base(path))
        if f"{CLASSIFIER}.weight" in state:
            return _loaded(name, model, state, path)
    if checkpoint is not None or pretrained:
        whole = timm_model(name, pretrained=pretrained, checkpoint=checkpoint, num_classes=0, **options)
        _take_features(name, backbone, whole)
    return model


def _features(name: str, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The levels of a backbone, with the options by which it takes pictures of as many sizes as it can."""
    reason: Exception | None = None
    for levels in (LEVELS, LEVELS[-1:]):  # a shallow one may not have so many
        for flexible in FLEXIBLE:
            options = {**flexible, **given}
            try:
                return timm.create_model(name, features_only=True, out_indices=levels, **options), options
            except (TypeError, AssertionError, RuntimeError, ValueError, IndexError, AttributeError) as error:
                reason = error
    timm_model(name, num_classes=0, **given)  # the options may be at fault: then this says so
    told = " ".join(str(reason).split())[:200]
    raise ConfigError([f"name={name!r}: timm gives no maps of features of it ({told}). {ANOTHER}"])


ANOTHER = "Take another backbone, such as resnet50, convnext_tiny or vit_small_patch14_dinov2."


def _has_patches(backbone: nn.Module) -> bool:
    return any(n.rpartition(".")[2] == "patch_embed" for n, _ in backbone.named_modules())


@torch.no_grad()
def _refuse_one_size(name: str, model: TimmSegmenter) -> None:
    """Pictures and crops differ in size: a backbone that takes one alone is refused before any training."""
    mode = model.training
    try:
        model.eval()(torch.zeros(1, 3, *PROBE))
    except (AssertionError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise ConfigError(
            [f"name={name!r}: does not take pictures of any size ({told}). {ANOTHER}"]
        ) from None
    model.train(mode)


def _take_features(name: str, backbone: nn.Module, whole: nn.Module) -> None:
    """Copy the weights of a whole timm model, loaded strictly, into its levels, which name them otherwise:
    `stages_0.…` for `stages.0.…`, or behind `model.`."""
    theirs = {key.replace(".", "_"): tensor for key, tensor in whole.state_dict().items()}
    state = {}
    for key in (own := backbone.state_dict()):
        plain = key.replace(".", "_")
        found = theirs.get(plain, theirs.get(plain.removeprefix("model_")))
        if found is not None and found.shape == own[key].shape:
            state[key] = found
    if gone := [key for key in own if key not in state]:
        raise UserError(f"{name}: timm names {truncate_list(gone)} otherwise in its levels. {ANOTHER}")
    backbone.load_state_dict(state)


def _loaded(name: str, model: nn.Module, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    key = f"{CLASSIFIER}.weight"
    fresh = [] if len(state[key]) == len(model.state_dict()[key]) else [CLASSIFIER]
    load_into(model, state, path, f"{name} with its head", "Give the options that it was made with.", fresh)
    return model
