"""Draws the digits recipes' two domains and what each method reaches, for the README.

    python -m benchmarks.digits_picture

Reads benchmarks/results/tune_digits_{vit,resnet}.json and writes docs/images/digits.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from lora_lightning.data.digits import MEAN, STD, load_scans, render, split_indices

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "digits.png"
METHODS = {"probe": "linear probe", "lora": "LoRA, r = 16", "full": "full fine-tuning"}
MODELS = {"vit": "ViT", "resnet": "ResNet"}
COLOURS = {"before": "#b8b8b8", "probe": "#8fb3d9", "lora": "#d9552b", "full": "#3a5f8a"}


def main() -> None:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.1), width_ratios=(1.25, 1), layout="constrained"
    )
    _draw_domains(left)
    _draw_accuracies(right, {m: json.loads((RESULTS / f"tune_digits_{m}.json").read_text()) for m in MODELS})
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"wrote {PICTURE}")


def _draw_domains(axes: Any) -> None:
    """Test scans in both domains, each digit twice."""
    scans, labels = load_scans()
    test = split_indices()[2]
    rows = []
    for domain in ("source", "target"):
        for copy in range(2):
            chosen = torch.stack([test[labels[test] == digit][copy] for digit in range(10)])
            rows.append(_row(render(scans[chosen], domain, torch.Generator().manual_seed(3 + copy))))
    axes.imshow(torch.cat(rows, dim=0), interpolation="nearest")
    axes.set_yticks([17.5, 53.5], ["pretrained on", "adapted to"])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _row(images: Tensor) -> Tensor:
    """(10, 3, 16, 16) normalized -> (18, 180, 3) in [0, 1], with white between."""
    shown = (images * STD + MEAN).clamp(0, 1)
    framed = torch.nn.functional.pad(shown, (1, 1, 1, 1), value=1.0)
    return torch.cat(list(framed), dim=2).permute(1, 2, 0)


def _draw_accuracies(axes: Any, results: dict[str, Any]) -> None:
    """A group of bars for each model: the mean over seeds, and each seed as a dot."""
    for position, (model, name) in enumerate(MODELS.items()):
        found = results[model]
        bars = {"before": [found["before_test_acc"]]}
        bars |= {method: found["chosen"][method]["test_acc"] for method in METHODS}
        for offset, (method, values) in enumerate(bars.items()):
            x = position * 5 + offset
            axes.bar(x, mean(values), color=COLOURS[method], width=0.85)
            axes.text(x, 4, f"{mean(values):.0f}", ha="center", color="white", fontsize=9)
            if len(values) > 1:
                axes.plot([x] * len(values), values, "k.", markersize=4)
        axes.text(position * 5 + 1.5, 103, name, ha="center")
    axes.set_ylim(0, 110)
    axes.set_xticks([])
    axes.set_ylabel("test accuracy, %")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    labels = {"before": "before", **METHODS}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[m]) for m in labels]
    axes.legend(handles, labels.values(), ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False)


if __name__ == "__main__":
    main()
