"""The networks of the training benchmark, with random weights, and the ways of training them.

Every way of LoRA has the same rank and the same targets. The floor is the frozen network with a trained
head and the gradient flowing down to the output of the stem: what no LoRA step can go below.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.layers.norm import has_statistics

RANK = 8
CLASSES = 10
IMPLEMENTATIONS = ("keep_inputs", "reference", "fused")  # of ours, beside the one it chooses itself
WAYS = ("floor", "full", "peft", "ours", "folded", *IMPLEMENTATIONS)
SIDE = 800  # pixels, of a picture for the detector


@dataclass(frozen=True)
class Workload:
    """A network and a batch for it.

    Attributes:
        build: the network.
        batch: (batch size) -> inputs and integer labels of the outputs' first dimensions; of a network
            that gives its loss itself the labels are empty.
        size: the usual batch size.
        stem: the module below which no gradient flows at the floor; "" is the input itself.
        targets: regular expression of the adapted layers' full names.
        head: the module that every way trains in full.
        peer: whether PEFT can adapt it.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    size: int
    stem: str
    targets: str
    head: str
    peer: bool = True


def images(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 224, 224), torch.randint(0, CLASSES, (size,))


def sounds(size: int, seconds: int = 5) -> tuple[Tensor, Tensor]:
    """At 16 kHz, with a label each 20 ms."""
    return torch.randn(size, 16_000 * seconds), torch.randint(0, CLASSES, (size, 50 * seconds - 1))


def from_timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES)

    return build


def resnet50() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50(num_classes=CLASSES)


class Wav2Vec2(nn.Module):
    """torchaudio's encoder without dropout, which would cost the floor and every other way the same."""

    def __init__(self, size: str) -> None:
        super().__init__()
        import torchaudio

        nothing = dict.fromkeys(
            (
                "encoder_projection_dropout",
                "encoder_attention_dropout",
                "encoder_ff_interm_dropout",
                "encoder_dropout",
                "encoder_layer_drop",
            ),
            0.0,
        )
        self.net = getattr(torchaudio.models, f"wav2vec2_{size}")(**nothing, aux_num_out=CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]


class FasterRCNN(nn.Module):
    """torchvision's at its usual size, with the frozen norms of its trained form; gives the sum of its losses
    in two objects an image."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection import fasterrcnn_resnet50_fpn

        from lora_lightning.models.detection import trained_form

        net = fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIDE, max_size=SIDE
        )
        self.net = trained_form("fasterrcnn_resnet50_fpn", net)
        for name, norm in self.net.named_modules():
            if name.endswith("bn3"):
                norm.weight.fill_(0.1)  # or random residual branches, not normalized, would add up

    def forward(self, x: Tensor) -> Tensor:
        boxes = torch.tensor([[50.0, 75, 350, 500], [375, 150, 750, 775]], device=x.device)
        target = {"boxes": boxes, "labels": torch.tensor([1, 2], device=x.device)}
        losses = self.net(list(x), [dict(target) for _ in x])
        return torch.stack(list(losses.values())).sum()


class Recurrent(nn.Module):
    """Three LSTM layers of 512 over 80 features and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(80, 512, 3, batch_first=True)
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


SWIN = r"layers\.\d\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|downsample\.reduction)"
BLOCKS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
PYRAMID = r"net\.backbone\.(body\.layer\d\.\d\.(conv\d|downsample\.0)|fpn\.\w+_blocks\.\d\.0)"
ENCODER = r"net\.encoder\.transformer\.layers\.\d+\.(attention\.\w+_proj|feed_forward\.\w+_dense)"
WORKLOADS = {
    "vit_small": Workload(from_timm("vit_small_patch16_224"), images, 8, "patch_embed", BLOCKS, "head"),
    "vit_base": Workload(from_timm("vit_base_patch16_224"), images, 8, "patch_embed", BLOCKS, "head"),
    "swin_tiny": Workload(
        from_timm("swin_tiny_patch4_window7_224"), images, 8, "patch_embed", SWIN, "head.fc"
    ),
    "resnet50": Workload(resnet50, images, 8, "maxpool", r"layer\d\.\d\.(conv\d|downsample\.0)", "fc"),
    "fasterrcnn_resnet50_fpn": Workload(
        FasterRCNN,
        lambda size: (torch.rand(size, 3, SIDE, SIDE), torch.empty(0)),
        1,
        "net.backbone.body.maxpool",
        PYRAMID,
        "net.roi_heads.box_predictor",
    ),
    "wav2vec2_base": Workload(
        lambda: Wav2Vec2("base"), sounds, 4, "net.encoder.feature_projection", ENCODER, "net.aux"
    ),
    "wav2vec2_large": Workload(
        lambda: Wav2Vec2("large"), sounds, 4, "net.encoder.feature_projection", ENCODER, "net.aux"
    ),
    "lstm": Workload(
        Recurrent,
        lambda size: (torch.randn(size, 200, 80), torch.randint(0, CLASSES, (size, 200))),
        8,
        "",
        r"lstm\.weight_[ih]h_l\d",
        "head",
        peer=False,
    ),
}


def build(way: str, workload: Workload, **options: Any) -> nn.Module:
    """The network in train mode, ready to be trained in the way given.

    Args:
        way: "floor", "full", "peft", "ours", "keep_inputs", "reference" and "fused" (ours with that
            `implementation`), "folded" (ours with `fold_norms`), "ours_int8" and "ours_nf4" (on a
            quantized base), "peft_nf4" (PEFT on bitsandbytes' layers).
        options: `rank`, `dropout` and `use_dora`, of PEFT and of ours.
    """
    torch.manual_seed(0)
    model = workload.build().train()
    if way == "full":
        return model
    if way == "floor":
        return _floor(model, workload)
    if way in ("ours_int8", "ours_nf4"):
        ll.quantize(model, way.removeprefix("ours_"))
    if way == "peft_nf4":
        as_bitsandbytes_has_it(model, workload.targets)
    if way in ("peft", "peft_nf4"):
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            model,
            LoraConfig(
                r=options.get("rank", RANK),
                lora_alpha=2 * options.get("rank", RANK),
                target_modules=workload.targets,
                modules_to_save=[workload.head],
                lora_dropout=options.get("dropout", 0.0),
                use_dora=options.get("use_dora", False),
            ),
        )
    if way in IMPLEMENTATIONS:
        options["implementation"] = way
    if way == "folded":
        options["fold_norms"] = True
    options = {"rank": RANK, **options}
    ll.inject(
        model, ll.LoRAConfig(target_modules=workload.targets, modules_to_save=[workload.head], **options)
    )
    return model


def as_bitsandbytes_has_it(model: nn.Module, targets: str) -> None:
    """The layers of these names as `bitsandbytes.nn.Linear4bit`, in blocks of 64 as ours, one scale each."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if not re.fullmatch(targets, name):
            continue
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, compute_dtype=torch.float32, compress_statistics=False,
            quant_type="nf4",
        )  # fmt: skip
        made.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=False, blocksize=64, quant_type="nf4"
        )
        made.bias = layer.bias
        made.support_avx512bf16_for_cpu = False  # its packing in eval mode fails at widths of 96
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to("cpu"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # as transformers tells PEFT


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    if not labels.numel():
        return outputs
    return F.cross_entropy(outputs.flatten(0, -2).float(), labels.flatten())


def _floor(model: nn.Module, workload: Workload) -> nn.Module:
    model.requires_grad_(False)
    model.get_submodule(workload.head).requires_grad_(True)
    for module in model.modules():
        if has_statistics(module):
            module.eval()
    if workload.stem:
        model.get_submodule(workload.stem).register_forward_hook(lambda _m, _x, y: _leaf(y))
    else:
        model.register_forward_pre_hook(lambda _m, x: tuple(_leaf(t) for t in x))
    return model


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_()
