"""rtdetr: RT-DETR of transformers, in torchvision's convention of detectors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, MissingFileError
from lora_lightning.models.hub import WEIGHTS, hub_files
from lora_lightning.models.hub_folder import load_network, reading, refuse_adapter_beside, refuse_address
from lora_lightning.utils.checks import require, strays
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import at_least, multiple_of, path

with loading("torchvision"):
    from torchvision.ops import box_convert

with loading("transformers", "detr"):
    import transformers
    from transformers import AutoModelForObjectDetection, RTDetrConfig, RTDetrImageProcessor

FILES = ("config.json", "preprocessor_config.json", WEIGHTS)
KINDS = ("rt_detr", "rt_detr_v2")
DENOISING = "_dn_"


def rtdetr(
    num_classes: Annotated[int, at_least(1)],
    name: str = "PekingU/rtdetr_r50vd",
    *,
    pretrained: bool = True,
    checkpoint: Annotated[str | None, path("a folder of the hub's files")] = None,
    image_size: Annotated[int, multiple_of(32)] = 640,
    **config: Any,
) -> RTDetr:
    """Build RT-DETR (Zhao et al. 2023, arXiv 2304.08069) or its second version (arXiv 2407.17140).

    Where the weights were made for another number of classes, the layers that know the classes
    (`class_embed`, `enc_score_head`, `denoising_class_embed`) are fresh ones.

    Args:
        num_classes: how many classes there are, the background not counted: labels are 1 … num_classes.
        name: a repository of the hub.
        pretrained: load its weights, from the hub's cache or the internet; false builds the model from
            `config` alone.
        checkpoint: a folder with config.json and model.safetensors, such as `save_pretrained` writes;
            it takes the place of `pretrained`.
        image_size: height and width to which images are brought, in pixels.
        **config: options of `transformers.RTDetrConfig` (`num_queries`, `decoder_layers`, …).

    Raises:
        ConfigError: bad options.
        MissingFileError: weights that are not on this machine and cannot be downloaded now.
        AdapterFileError: a folder with other files than RT-DETR's, or damaged ones.
    """
    known = [n for n in RTDetrConfig().to_dict() if n != "num_labels"]
    require(rtdetr, locals(), strays(config, known, "RT-DETR"))
    if checkpoint is not None:
        folder = _folder(checkpoint)
    elif pretrained:
        folder = hub_files(name, name, FILES, "weights")[-1].parent
    else:
        model = AutoModelForObjectDetection.from_config(RTDetrConfig(**{**config, "num_labels": num_classes}))
        return RTDetr(model, RTDetrImageProcessor(), image_size)
    return RTDetr(*_loaded(folder, num_classes, config), image_size)


class RTDetr(nn.Module):
    """A model of transformers and its processor as one of torchvision's detectors.

    In train mode (images, targets) -> a dict of losses, whose sum is the model's own loss: `loss_vfl`
    (varifocal), `loss_bbox` and `loss_giou` summed over the decoder's layers, and `loss_denoising`. In
    eval mode images -> a list of dicts `boxes` (n, 4) x1 y1 x2 y2 in pixels of the image, `labels` (n,)
    from 1, `scores` (n,), best first. Images are tensors (3, height, width) in [0, 1] of any size; the
    processor resizes and normalizes them as the model was trained.

    Args:
        model: images (batch, 3, height, width) -> logits and boxes, as `RTDetrForObjectDetection`.
        processor: how it wants its images, and how its outputs are read.
        image_size: height and width in pixels.
    """

    model: Any

    def __init__(self, model: nn.Module, processor: Any, image_size: int) -> None:
        super().__init__()
        self.model, self.processor, self.image_size = model, processor, image_size

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        pixels = self._pixels(images)
        if not self.training:
            sizes = [tuple(image.shape[-2:]) for image in images]
            outputs = self.model(pixel_values=pixels)
            found = self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
            return [{**f, "labels": f["labels"] + 1} for f in found]
        if targets is None:
            raise ValueError("RT-DETR needs targets in train mode.")
        labels = [_label(t, image) for t, image in zip(targets, images, strict=True)]
        losses = _summed(self.model(pixel_values=pixels, labels=labels).loss_dict)
        # Without an object there is nothing to denoise; DDP wants a gradient all the same.
        nothing = 0 * self.model.model.denoising_class_embed.weight.sum()
        return {"loss_denoising": nothing, **losses}

    def get_classifier(self) -> list[nn.Module]:
        """The layers that know the classes, and those that predict boxes."""
        inner = self.model.model
        heads = [
            inner.enc_score_head,
            inner.enc_bbox_head,
            inner.decoder.class_embed,
            inner.decoder.bbox_embed,
        ]
        return [*heads, inner.denoising_class_embed]

    def _pixels(self, images: list[Tensor]) -> Tensor:
        """(batch, 3, height, width); float again, because the processor knows only float32."""
        size = {"height": self.image_size, "width": self.image_size}
        pixels = self.processor(images=list(images), size=size, do_rescale=False, return_tensors="pt")
        return pixels["pixel_values"].to(images[0])


def _label(target: Mapping[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """Classes from 0, boxes as centre and size in shares of the image, crowd regions left out."""
    height, width = image.shape[-2:]
    boxes, labels = target["boxes"], target["labels"]
    if "iscrowd" in target:
        kept = target["iscrowd"] == 0
        boxes, labels = boxes[kept], labels[kept]
    scale = boxes.new_tensor([width, height, width, height])
    return {"class_labels": labels - 1, "boxes": box_convert(boxes, "xyxy", "cxcywh") / scale}


def _summed(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dozens of losses, one a layer and kind, as four."""
    summed: dict[str, Tensor] = {}
    for name, loss in losses.items():
        kind = "loss_denoising" if DENOISING in name else "_".join(name.split("_")[:2])
        summed[kind] = summed[kind] + loss if kind in summed else loss
    return summed


def _folder(checkpoint: str) -> Path:
    refuse_address(checkpoint)
    folder = Path(checkpoint).expanduser().absolute()
    missing = [name for name in ("config.json", WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"checkpoint={str(checkpoint)!r}: {folder} has no {' and no '.join(missing)}. Give a folder "
            "of the hub's files, as `hf download REPOSITORY --local-dir FOLDER` or save_pretrained makes."
        )
    return folder


def _loaded(folder: Path, num_classes: int, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    refuse_adapter_beside(folder)
    with reading(folder, "RT-DETR"):
        found = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if found.model_type not in KINDS:
            raise AdapterFileError(f"{folder} holds a {found.model_type}; give one of {', '.join(KINDS)}.")
        processor = RTDetrImageProcessor()
        if (folder / "preprocessor_config.json").is_file():
            processor = RTDetrImageProcessor.from_pretrained(folder, local_files_only=True)
    options = {**config, "num_labels": num_classes}
    model, fresh = load_network(folder, AutoModelForObjectDetection, "RT-DETR", _knows_classes, **options)
    if fresh:
        logging.getLogger(__name__).info("%s: fresh layers for %d classes", folder, num_classes)
    return model, processor


def _knows_classes(name: str) -> bool:
    return any(part in name for part in ("class_embed", "enc_score_head"))
