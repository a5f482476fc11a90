"""segmenter: torchvision's models of semantic segmentation, with weights from a file or torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from lora_lightning.files.weights import load_into, network_state
from lora_lightning.models.base_file import Weights, base_file, read_base
from lora_lightning.models.torchvision_weights import backbone_weights
from lora_lightning.utils.checks import require
from lora_lightning.utils.download import DOWNLOAD_AGAIN, url_file
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import Check, at_least, one_of
from lora_lightning.utils.torch_file import read_torch

with loading("torchvision"):
    from torchvision.models import get_model_builder, get_model_weights
    from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3

TORCHVISION = (
    "deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50", "fcn_resnet101", "lraspp_mobilenet_v3_large",
)  # fmt: skip
# The layers whose outputs are so many as there are classes.
CLASS_LAYERS = ("classifier.4", "aux_classifier.4", "classifier.low_classifier", "classifier.high_classifier")
AUX = "aux_classifier."
PRETRAINED = Check(
    "true, backbone (ImageNet's weights in the backbone alone) or false",
    lambda v: isinstance(v, bool) or v == "backbone",
    ("true", "false", "backbone"),
)
REMEDY = "Give the weights of this model, and model.aux_loss as they were made with it."


class _WholeHead:
    """A model of torchvision whose head is new as a whole, not only the layer that predicts classes."""

    classifier: nn.Module
    aux_classifier: nn.Module | None

    def get_classifier(self) -> list[nn.Module]:
        """All that stands behind the backbone, for `planning.heads` to find."""
        return [m for m in (self.classifier, getattr(self, "aux_classifier", None)) if m is not None]


class NewHeadFCN(_WholeHead, FCN):
    """FCN on a pretrained backbone."""


class NewHeadDeepLabV3(_WholeHead, DeepLabV3):
    """DeepLabV3 on a pretrained backbone."""


class NewHeadLRASPP(_WholeHead, LRASPP):
    """LR-ASPP on a pretrained backbone."""


NEW_HEADS: dict[type[nn.Module], type[nn.Module]] = {
    FCN: NewHeadFCN, DeepLabV3: NewHeadDeepLabV3, LRASPP: NewHeadLRASPP,
}  # fmt: skip


def segmenter(
    name: Annotated[str, one_of(*TORCHVISION)],
    num_classes: Annotated[int, at_least(1)],
    *,
    pretrained: Annotated[bool | Literal["backbone"], PRETRAINED] = False,
    checkpoint: Weights = None,
    aux_loss: bool = True,
) -> nn.Module:
    """Build a segmentation model of torchvision: images (batch, 3, height, width), normalized as ImageNet's,
    -> a dict of logits (batch, num_classes, height, width), `out` and perhaps `aux`.

    Where the weights were made for other classes, the layers that predict classes are fresh ones, and the
    rest is loaded whole or not at all. LoRA's "auto" then adapts the backbone and the head's inner layers,
    and trains those fresh ones in full; on a pretrained backbone alone it trains the whole head.

    Args:
        name: `deeplabv3_resnet50`, `deeplabv3_resnet101`, `deeplabv3_mobilenet_v3_large` (Chen et al. 2017,
            arXiv 1706.05587), `fcn_resnet50`, `fcn_resnet101` (Long et al. 2015, arXiv 1411.4038) or
            `lraspp_mobilenet_v3_large` (Howard et al. 2019, arXiv 1905.02244).
        num_classes: how many classes there are, the background counted if it is one.
        pretrained: load torchvision's weights, trained on COCO with Pascal VOC's 21 classes, from torch's
            cache or the internet; "backbone" loads its ImageNet weights into the backbone alone.
        checkpoint: a .safetensors file of the whole model; it takes the place of `pretrained`. Keys may
            carry the `model.` of a LightningModule.
        aux_loss: with a second head on the last stage but one, which helps the training of the backbone
            (Zhao et al. 2017, arXiv 1612.01105); LR-ASPP has none.

    Raises:
        ConfigError: an unknown name, or bad options.
        MissingFileError: weights that are not on this machine and cannot be downloaded now.
        AdapterFileError: a checkpoint that is pickled, damaged, or made for another model.
    """
    require(segmenter, locals())
    if checkpoint is not None:
        path = base_file(checkpoint)
        return _loaded(name, num_classes, aux_loss, read_base(path), path)
    if pretrained is True:
        path = url_file(name, get_model_weights(name).DEFAULT.url)
        return _loaded(name, num_classes, aux_loss, read_torch(path, DOWNLOAD_AGAIN), path)
    if pretrained == "backbone":
        model = _build(name, num_classes, aux_loss, weights_backbone=backbone_weights(name))
        model.__class__ = NEW_HEADS[type(model)]
        return model
    return _build(name, num_classes, aux_loss)


def _build(name: str, num_classes: int, aux_loss: bool, **weights: Any) -> nn.Module:
    """With random weights, or in its backbone those that torchvision is told to load."""
    aux = {} if name.startswith("lraspp") else {"aux_loss": aux_loss}
    options = {"weights": None, "weights_backbone": None, "num_classes": num_classes, **aux, **weights}
    return get_model_builder(name)(**options)


def _loaded(
    name: str, num_classes: int, aux_loss: bool, given: Mapping[str, Tensor], path: Path
) -> nn.Module:
    model = _build(name, num_classes, aux_loss)
    own, state = model.state_dict(), network_state(model, given)
    if not any(n.startswith(AUX) for n in own):
        state = {n: t for n, t in state.items() if not n.startswith(AUX)}
    fresh = [n for n in CLASS_LAYERS if _rows(own, n) != _rows(state, n)]
    load_into(model, state, path, f"{name} as it was built", REMEDY, fresh)
    return model


def _rows(state: Mapping[str, Tensor], layer: str) -> int:
    """Outputs of a layer; 0 where there is no such layer."""
    weight = state.get(f"{layer}.weight")
    return 0 if weight is None else len(weight)
