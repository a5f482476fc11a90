"""Tunes the digits recipes: the learning rate of each method, by the validation images alone.

python -m benchmarks.tune_digits --model vit
python -m benchmarks.tune_digits --model resnet

Each method gets as many learning rates, and the same epochs, batches and seeds. The rate with the
best mean validation accuracy is chosen; only the models of the chosen rates meet the test images.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch

from benchmarks.fits import quiet, trainer
from lora_lightning import LoRACallback, linear_probe
from lora_lightning.data.digits import DigitsDataModule
from lora_lightning.models.timm import timm_model
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
CLASSES = 10
EPOCHS = 25
MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "name": "vit_tiny_patch16_224",
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "checkpoint": "vit_digits",
    },
    "resnet": {
        "name": "resnet10t",
        "channels": [16, 32, 64, 128],
        "output_stride": 8,
        "checkpoint": "resnet_digits",
    },
}
LORA: dict[str, Any] = {"rank": 16, "target_modules": "all"}
RATES = {  # evenly spaced in the logarithm; no best rate is at an edge
    "vit": {
        "probe": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        "lora": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        "full": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    },
    "resnet": {
        "probe": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        "lora": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        "full": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    },
}


@dataclass
class Trial:
    """One method at one learning rate, over all seeds. Accuracies in percent, seconds a run."""

    method: str
    lr: float
    val: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    trained: int = 0
    classifiers: list[ImageClassifier] = field(default_factory=list, repr=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    name = parser.parse_args().model
    quiet()

    before = test_accuracy(classifier(name, lr=1e-3))
    trials = [run(name, method, lr) for method, rates in RATES[name].items() for lr in rates]
    best = {m: max((t for t in trials if t.method == m), key=lambda t: mean(t.val)) for m in RATES[name]}
    searched = [
        (t.method, f"{t.lr:g}", spread(t.val), "chosen" if t is best[t.method] else "") for t in trials
    ]
    print("\n" + format_table(("method", "lr", "validation %", ""), searched) + "\n")

    test = {method: [test_accuracy(c) for c in t.classifiers] for method, t in best.items()}
    tested = [("before", "", f"{before:.1f}", "0", "0")]
    for method, t in best.items():
        seconds = f"{mean(t.seconds):.0f}"
        tested.append((method, f"{t.lr:g}", spread(test[method]), f"{t.trained:,}", seconds))
    print(format_table(("method", "lr", "test %", "trained", "seconds"), tested))
    write(name, before, trials, best, test)


def run(name: str, method: str, lr: float) -> Trial:
    """Train on the target domain with each seed, and validate after the last epoch."""
    trial = Trial(method, lr)
    for seed in SEEDS:
        L.seed_everything(seed, verbose=False)
        module = classifier(name, lr)
        callbacks = [LoRACallback(verbose=False, **LORA)] if method == "lora" else []
        if method == "probe":
            linear_probe(module)
        fitter = trainer(callbacks=callbacks, max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS)
        start = time.perf_counter()
        fitter.fit(module, datamodule=DigitsDataModule("target", seed=seed))
        trial.seconds.append(time.perf_counter() - start)
        trial.val.append(100 * fitter.callback_metrics["val/acc"].item())
        trial.trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        trial.classifiers.append(module)
    print(f"{name} {method} lr={lr:g}: validation {spread(trial.val)}", flush=True)
    return trial


def classifier(name: str, lr: float) -> ImageClassifier:
    model = timm_model(**MODELS[name], num_classes=CLASSES)
    return ImageClassifier(model, CLASSES, optim=OptimConfig(lr=lr))


def test_accuracy(module: ImageClassifier) -> float:
    """In percent, on the target domain."""
    metrics = trainer().test(module, datamodule=DigitsDataModule("target"), verbose=False)
    return 100 * metrics[0]["test/acc"]


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def write(
    name: str,
    before: float,
    trials: list[Trial],
    best: dict[str, Trial],
    test: dict[str, list[float]],
) -> None:
    result = {
        "model": MODELS[name],
        "lora": LORA,
        "epochs": EPOCHS,
        "seeds": SEEDS,
        "torch": torch.__version__,
        "search": [{"method": t.method, "lr": t.lr, "val_acc": t.val} for t in trials],
        "chosen": {
            m: {"lr": t.lr, "test_acc": test[m], "trained": t.trained, "seconds": t.seconds}
            for m, t in best.items()
        },
        "before_test_acc": before,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"tune_digits_{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
