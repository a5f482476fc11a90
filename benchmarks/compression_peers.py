"""Peers beside `compress` on the embedded ResNet's convolutions: the same budget, no fine-tuning.

    pip install --no-deps fasterai tensorly tensorly-torch einops opt_einsum
    python -m benchmarks.compression_peers          writes benchmarks/results/compression_peers.json

Peers have one ratio for all layers, which is halved in on to reach the share; they see no data, and leave
1×1 convolutions. fasterai's `spatial` forgets dilation, and cannot run this network. Accuracy on upright
digits, 597 test images; times are of one image, one thread's processor time, dense / compressed in the same
round.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lightning as ll
from benchmarks.compression import digits
from benchmarks.measure import interleaved, ratios

RESULTS = Path(__file__).parent / "results" / "compression_peers.json"
SHARE = 0.35
HALVINGS = 7
ROUNDS = 20
COLOURS = 3


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    name, model, data, score, one = digits()
    models: dict[str, nn.Module] = {"dense": model}
    for way, plain in (("compress, by data", False), ("compress, by the weights", True)):
        models[way] = copy.deepcopy(model)
        ll.compress(models[way], parameters=SHARE, data=data, plain=plain)
    for method in ("tucker", "svd"):
        models[f"fasterai, {method}"] = within(model, partial(fasterai, model, method))
    models["tensorly-torch, tucker"] = within(model, partial(tltorch, model))
    times = interleaved({n: partial(m, *one) for n, m in models.items()}, ROUNDS, clock=time.process_time)
    faster = {n: 1 / found["ratio"] for n, found in ratios(times, "dense").items()}
    rows = [
        {"way": n, "parameters": _size(m) / _size(model), "score": score(m), "faster": faster[n]}
        for n, m in models.items()
    ]
    RESULTS.write_text(json.dumps({"model": name, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


def within(model: nn.Module, made: Callable[[float], nn.Module]) -> nn.Module:
    """The largest of a peer's models whose parameters fit the share."""
    low, high = 0.02, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _size(made(middle)) <= SHARE * _size(model):
            low = middle
        else:
            high = middle
    return made(low).eval()


def fasterai(model: nn.Module, method: str, kept: float) -> nn.Module:
    """By fasterai's decomposer, of ranks of which this share is kept; its Tucker fails on the first layer."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer

    stem = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == COLOURS]
    found: nn.Module = Conv_Decomposer().decompose(
        model, percent_removed=1 - kept, method=method, exclude=stem
    )
    return found


def tltorch(model: nn.Module, kept: float) -> nn.Module:
    """By tensorly-torch's factorized convolutions, with this share of each kernel's parameters."""
    import tltorch as peer

    new = copy.deepcopy(model)
    for holder in list(new.modules()):
        for name, layer in list(holder._modules.items()):
            if isinstance(layer, nn.Conv2d) and min(layer.kernel_size) > 1:
                options: dict[str, Any] = {"implementation": "factorized", "factorization": "tucker"}
                holder._modules[name] = peer.FactorizedConv.from_conv(layer, rank=kept, **options)
    return new


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
