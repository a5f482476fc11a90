"""How much faster large networks are when they are smaller: ratios of one thread's processor time for one
image, dense / compressed, interleaved. Weights are random, as speed depends on sizes alone.

Every layer keeps the same share of its parameters, linear layers and 1×1 convolutions by `svd`, others by
`channel`: VGG-16's classifier, and ResNet-50's convolutions but the first, with its norms folded into them as
one deploys it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lora_lightning as ll
from benchmarks.measure import interleaved, ratios

CLASSIFIER, RESNET = "vgg16_classifier", "resnet50"
SHARES = {CLASSIFIER: (1 / 3, 1 / 5, 1 / 10), RESNET: (0.5, 0.35)}  # of each layer
ROUNDS = {CLASSIFIER: 20, RESNET: 15}
LAYERS: dict[str, tuple[type[nn.Module], ...]] = {CLASSIFIER: (nn.Linear,), RESNET: (nn.Conv2d,)}
STEP = {CLASSIFIER: 8, RESNET: 16}
STEM = 3  # input channels, of what stays


@torch.no_grad()
def speeds(known: set[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """A row of each network and share that is not known."""
    for name, build in ((CLASSIFIER, classifier), (RESNET, folded_resnet50)):
        if not (shares := [share for share in SHARES[name] if (name, share) not in known]):
            continue
        torch.manual_seed(0)
        model, x = build()
        for share in shares:
            smaller = copy.deepcopy(model)
            evenly(smaller, share, LAYERS[name], STEP[name])
            ways = {"dense": partial(model, x), "smaller": partial(smaller, x)}
            times = interleaved(ways, ROUNDS[name], clock=time.process_time)
            found = ratios(times, "smaller")["dense"]
            left = _size(smaller) / _size(model)
            yield {"model": name, "share": share, "parameters": left, **_rounded(found)}


def classifier() -> tuple[nn.Module, torch.Tensor]:
    """VGG-16's three linear layers, and what they get for one image."""
    layers = [nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers).eval(), torch.randn(1, 25088)


def folded_resnet50() -> tuple[nn.Module, torch.Tensor]:
    """torchvision's for one image, with its norms in its convolutions."""
    import torchvision

    model = torchvision.models.resnet50().eval()
    for holder in list(model.modules()):
        children = list(holder._modules.items())
        for (first, conv), (second, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                holder._modules[first] = fuse_conv_bn_eval(conv, norm)
                holder._modules[second] = nn.Identity()
    return model, torch.randn(1, 3, 224, 224)


def evenly(model: nn.Module, share: float, kinds: tuple[type[nn.Module], ...], step: int) -> None:
    """The same share of the parameters of each layer of these kinds, with random values."""
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, kinds) and layer.weight.shape[1] > STEM:
            out, inner, *kernel = layer.weight.shape
            size = inner * prod(kernel)
            rank = max(step, int(share * out * size / (out + size)) // step * step)
            shape, form = [*layer.weight.shape], "svd" if prod(kernel) == 1 else "channel"
            kind = type(layer).__name__
            layers.append({"name": name, "kind": kind, "form": form, "shape": shape, "rank": [rank]})
    ll.compressed(model, {"format": 1, "layers": layers})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        else:
            nn.init.zeros_(parameter)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _rounded(found: Mapping[str, float]) -> dict[str, float]:
    return {"faster": found["ratio"], "low": found["low"], "high": found["high"]}
