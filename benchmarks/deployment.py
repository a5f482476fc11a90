"""What LoRA costs before training and after: injecting updates into ViT-L/16, against PEFT's
`get_peft_model`, and inference with the updates merged, against the base model; of a ResNet-50 also with the
norms folded into the convolutions by torch.

    python -m benchmarks.deployment [--check]

All ways run in turn, round after round, timed in CPU time; reported are the median and quartiles of the ratio
to the peer of the same round. Writes benchmarks/results/deployment.json. With --check the exit code is 1 when
injection takes more than half of PEFT's time, or merged inference over 5 % more than the base's (noise of a
shared machine: the ejected model, plain layers again, differs as much).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.fx.experimental.optimization import fuse

import lora_lightning as ll
from benchmarks.measure import interleaved, machine, ratios
from benchmarks.models import BLOCKS

CONFIG = ll.LoRAConfig(rank=8, target_modules=rf".*{BLOCKS}", modules_to_save=["head"])
PEER = LoraConfig(r=8, lora_alpha=16, target_modules=rf".*{BLOCKS}", modules_to_save=["head"])
LIMITS = {"injection": 0.5, "inference": 1.05, "folded inference": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a limit is exceeded")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "injection": injection(options.rounds),
        "inference": inference(options.rounds),
        "folded inference": folded_inference(options.rounds),
    }
    too_slow = 0
    for name, limit in LIMITS.items():
        way = found[name]["ours"]
        print(f"{name}: {way['ratio']:.3f} ({way['low']:.3f} to {way['high']:.3f}), allowed {limit}")
        too_slow += way["ratio"] > limit
    path = Path(__file__).parent / "results" / "deployment.json"
    path.write_text(json.dumps({**found, **machine(1, "cpu")}, indent=2) + "\n")
    return int(options.check and too_slow > 0)


def injection(rounds: int) -> dict[str, dict[str, float]]:
    """Each round adapts a fresh model, whose building is not counted."""
    ways: dict[str, Callable[[nn.Module], object]] = {
        "ours": lambda model: ll.inject(model, CONFIG),
        "peft": lambda model: get_peft_model(model, PEER),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, adapt in ways.items():
            with torch.device("meta"):  # neither way reads a weight
                model = timm.create_model("vit_large_patch16_224", num_classes=10)
            model.to_empty(device="cpu")
            start = time.process_time()
            adapt(model)
            if index:
                times[name].append(time.process_time() - start)
    return ratios(times, "peft")


def inference(rounds: int) -> dict[str, dict[str, float]]:
    """ViT-S/16, 8 images."""
    base, merged = (timm.create_model("vit_small_patch16_224", num_classes=10).eval() for _ in range(2))
    ll.inject(merged, CONFIG)
    ll.merge(merged)
    x = torch.randn(8, 3, 224, 224)
    with torch.inference_mode():
        steps = {"base": lambda: base(x), "ours": lambda: merged(x)}
        return ratios(interleaved(steps, rounds, clock=time.process_time), "base")


def folded_inference(rounds: int) -> dict[str, dict[str, float]]:
    """ResNet-50, 4 images."""
    base, adapted = (torchvision.models.resnet50().eval() for _ in range(2))
    ll.inject(adapted, ll.LoRAConfig(target_modules="all"))
    ll.eject(adapted.eval(), merged=True)
    folded = fuse(adapted)
    x = torch.randn(4, 3, 224, 224)
    with torch.inference_mode():
        steps = {"base": lambda: base(x), "ours": lambda: folded(x)}
        return ratios(interleaved(steps, rounds, clock=time.process_time), "base")


if __name__ == "__main__":
    sys.exit(main())
