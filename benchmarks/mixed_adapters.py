"""What a batch with a different adapter in each sample costs, from 1 to 1,000 adapters in one model.

    python -m benchmarks.mixed_adapters

Against one selected adapter, against the base, against running the samples of each adapter by themselves,
and against PEFT's `adapter_names=`. Writes results/mixed_adapters.json and results/mixed_adapters.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import lora_lightning as ll
from benchmarks.measure import interleaved, machine, ratios
from lora_lightning.layers.update import LowRankUpdate

RESULTS = Path(__file__).parent / "results"
TARGETS = ["qkv", "proj", "fc1", "fc2"]
RANK = 8
# PEFT's module dictionaries make building slow; its products are one by one, so that more adds nothing.
MOST_PEFT = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 3, 10, 32, 100, 316, 1000])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="mixed_adapters")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    rival = peft_model(copy.deepcopy(model), options.device)
    x = torch.randn(options.samples, 3, 224, 224, device=options.device)
    ll.inject(model, config(), adapter="a0")
    model.to(options.device)
    points = []
    for count in options.adapters:
        attach_adapter(model, rival if count <= MOST_PEFT else None, count)
        point = {"adapters": count, **measure(model, rival, x, count, options)}
        points.append(point)
        print(json.dumps(point), flush=True)
    about = {
        "model": options.model, "samples": options.samples, "rank": RANK, "rounds": options.rounds,
        **machine(1, options.device),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**about, "points": points}, indent=2) + "\n"
    (RESULTS / f"{options.name}.json").write_text(text)
    picture(about, points, RESULTS / f"{options.name}.png")


def config() -> ll.LoRAConfig:
    return ll.LoRAConfig(
        rank=RANK, target_modules=TARGETS, exclude_modules=["patch_embed.*"], modules_to_save=None
    )


def peft_model(model: nn.Module, device: str) -> Any:
    try:
        import peft
    except ImportError:
        return None
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=r"blocks\..*\.(qkv|proj|fc1|fc2)")
    rival = peft.get_peft_model(model, settings, adapter_name="a0")
    return rival.to(device).eval()


@torch.no_grad()
def attach_adapter(model: nn.Module, rival: Any, count: int) -> None:
    """Up to `count` adapters in both models, with values in every B."""
    for i in range(len(ll.adapter_names(model)), count):
        ll.add_adapter(model, f"a{i}")
    for update in (m for m in model.modules() if isinstance(m, LowRankUpdate)):
        if not update.lora_B.any():
            update.lora_B.normal_(std=0.02)
    if rival is not None:
        for i in range(len(rival.peft_config), count):
            rival.add_adapter(f"a{i}", rival.peft_config["a0"])
        rival.to(next(model.parameters()).device)


@torch.no_grad()
def measure(
    model: nn.Module, rival: Any, x: Tensor, count: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Medians and quartiles of the times relative to one selected adapter."""
    samples = [f"a{i * count // len(x)}" for i in range(len(x))]  # as many as there are, evenly spread

    def mixed() -> Tensor:
        with ll.mixed_adapters(model, samples):
            return model(x)

    def base() -> Tensor:
        with ll.adapters_off(model):
            return model(x)

    def loop() -> Tensor:
        parts = []
        for name in dict.fromkeys(samples):
            ll.set_adapter(model, name)
            parts.append(model(x[[i for i, sample in enumerate(samples) if sample == name]]))
        ll.set_adapter(model, "a0")
        return torch.cat(parts)

    steps: dict[str, Callable[[], Tensor]] = {
        "one": lambda: model(x),
        "base": base,
        "mixed": mixed,
        "loop": loop,
    }
    if rival is not None and count <= MOST_PEFT:
        steps["peft"] = lambda: rival(x, adapter_names=samples)
        steps["peft_one"] = lambda: rival(x)
    with torch.inference_mode():
        torch.testing.assert_close(mixed(), loop(), rtol=1e-3, atol=1e-4)
        clock = time.perf_counter if options.device == "cuda" else time.process_time
        times = interleaved(steps, options.rounds, device=options.device, clock=clock)
    return {"distinct": len({*samples}), **ratios(times, "one")}


def picture(about: dict[str, Any], points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {
        "loop": "the samples of each adapter by themselves",
        "peft": "PEFT, adapter_names=",
        "mixed": "mixed_adapters",
        "one": "one adapter for all samples",
        "base": "the base model",
    }
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, label in lines.items():
        some = [p for p in points if name in p]
        at = [p["adapters"] for p in some]
        axes.plot(at, [p[name]["ratio"] for p in some], marker="o", markersize=4, label=label)
        axes.fill_between(at, [p[name]["low"] for p in some], [p[name]["high"] for p in some], alpha=0.2)
    axes.set_xscale("log")
    axes.set_xlabel("adapters in the model")
    axes.set_ylabel("time of a batch, one adapter = 1")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{about['model']}, {about['samples']} samples, rank {about['rank']}, {about['device']}", fontsize=10
    )
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
