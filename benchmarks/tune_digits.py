"""Tunes the digits recipes: the learning rate of each method, by the validation images alone.

python -m benchmarks.tune_digits --model vit        goes on where it was stopped
python -m benchmarks.tune_digits --model resnet

Each method gets as many learning rates, more where the best lies at an edge, and the same epochs, batches and
seeds. The rate with the best mean validation accuracy is chosen; only the models of the chosen rates meet the
test images. Every finished run stands in `results/tune_digits_MODEL.json` and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch

from benchmarks.fits import quiet, trainer
from lora_lightning import LoRACallback, LoRAConfig, linear_probe
from lora_lightning.adapters.inject import train_parts
from lora_lightning.app.peft_lora import PeftLoRA
from lora_lightning.app.prepare import parts_of
from lora_lightning.data.digits import DigitsDataModule
from lora_lightning.models.timm import timm_model
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
CLASSES = 10
EPOCHS = 25
FACTOR = 2.0  # to the next rate where the best lies at an edge
WIDER = 3  # rates more at most
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
WITHOUT = {"resnet": ["layer3.0.conv2", "layer4.0.conv1", "layer4.0.conv2"]}  # dilated: PEFT cannot have them
RATES = {  # evenly spaced in the logarithm
    "vit": {
        "probe": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        "lora": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        "full": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
        "peft": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        "bitfit": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        "norm_only": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    },
    "resnet": {
        "probe": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        "lora": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        "full": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
        "peft": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        "bitfit": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        "norm_only": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    },
}


Key = tuple[str, float, int]  # method, rate, seed
Test = Callable[[], float]


class Runs:
    """What is done, in a file that is written anew after each run.

    Attributes:
        found: what stands in the file.
    """

    def __init__(self, name: str) -> None:
        self.name, self.path = name, RESULTS / f"tune_digits_{name}.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.found |= {"model": MODELS[name], "lora": LORA, "epochs": EPOCHS, "seeds": list(SEEDS)}
        self.search: list[dict[str, Any]] = self.found.setdefault("search", [])
        self._tests: dict[Key, Test] = {}

    def trial(self, method: str, lr: float) -> dict[str, Any]:
        """Of this rate, with every seed: trained now where it is not done. Accuracies in percent."""
        found = next((t for t in self.search if (t["method"], t["lr"]) == (method, lr)), None)
        if found is None:
            found = {"method": method, "lr": lr, "val_acc": [], "torch": torch.__version__}
            self.search.append(found)
        for seed in SEEDS[len(found["val_acc"]) :]:
            val, self._tests[method, lr, seed], found["trained"] = run(self.name, method, lr, seed)
            found["val_acc"].append(val)
            self.write()
        return found

    def chosen(self, method: str, lr: float) -> dict[str, Any]:
        """The same, and on the test images; what this program has not trained itself is trained again."""
        chosen: dict[str, Any] = self.found.setdefault("chosen", {})
        if chosen.get(method, {}).get("lr") != lr:
            trial = self.trial(method, lr)
            tests = [self._tests.get((method, lr, s)) or run(self.name, method, lr, s)[1] for s in SEEDS]
            accuracies = [test() for test in tests]
            chosen[method] = {"lr": lr, "test_acc": accuracies, "trained": trial["trained"]}
            self.write()
        self._tests.clear()
        return chosen[method]

    def write(self) -> None:
        text = json.dumps(self.found, indent=2) + "\n"
        write_whole(self.path, lambda place: Path(place).write_text(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    name = parser.parse_args().model
    quiet()
    warnings.filterwarnings("ignore")  # PEFT's
    runs = Runs(name)
    if "before_test_acc" not in runs.found:
        runs.found["before_test_acc"] = test_accuracy(classifier(name, lr=1e-3))
    best = {}
    for method, rates in RATES[name].items():
        best[method] = tune(runs, method, rates)
        runs.chosen(method, best[method])
    searched = [
        (t["method"], f"{t['lr']:g}", spread(t["val_acc"]), "chosen" if best[t["method"]] == t["lr"] else "")
        for t in runs.search
    ]
    print("\n" + format_table(("method", "lr", "validation %", ""), searched) + "\n")
    tested = [("before", "", f"{runs.found['before_test_acc']:.1f}", "0")]
    tested += [
        (m, f"{c['lr']:g}", spread(c["test_acc"]), f"{c['trained']:,}")
        for m, c in runs.found["chosen"].items()
    ]
    print(format_table(("method", "lr", "test %", "trained"), tested))


def tune(runs: Runs, method: str, first: tuple[float, ...]) -> float:
    """The rate of the best mean validation accuracy, the smaller of two; at an edge the next beyond is tried
    too."""
    rates = sorted(first)
    for _ in range(WIDER + 1):
        scores = {lr: mean(runs.trial(method, lr)["val_acc"]) for lr in rates}
        best = max(rates, key=lambda lr: (scores[lr], -lr))
        if best not in (rates[0], rates[-1]):
            break
        rates = sorted([*rates, float(f"{best / FACTOR if best == rates[0] else best * FACTOR:g}")])
    return best


def run(name: str, method: str, lr: float, seed: int) -> tuple[float, Test, int]:
    """Train on the target domain, and validate after the last epoch.

    Returns:
        Validation accuracy in percent; what tests the trained model; how many parameters were trained.
    """
    L.seed_everything(seed, verbose=False)
    module = classifier(name, lr)
    callbacks = prepare(module, method, WITHOUT.get(name))
    fitter = trainer(callbacks=callbacks, max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS)
    fitter.fit(module, datamodule=DigitsDataModule("target", seed=seed))
    val = 100 * fitter.callback_metrics["val/acc"].item()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    print(f"{name} {method} lr={lr:g} seed={seed}: validation {val:.1f}", flush=True)
    return val, lambda: test_accuracy(module), trained


def prepare(module: ImageClassifier, method: str, without: list[str] | None) -> list[L.Callback]:
    """Let train what the method trains; the callbacks of its Trainer.

    Args:
        without: what PEFT leaves alone.
    """
    config = LoRAConfig(**LORA)
    if method == "lora":
        return [LoRACallback(config, verbose=False)]
    if method == "probe":
        linear_probe(module)
    elif method == "peft":
        PeftLoRA(module, LoRAConfig(**LORA, exclude_modules=without))
    elif method in ("bitfit", "norm_only"):
        parts = parts_of(module, method, config)
        train_parts(module, parts)
        return [LoRACallback(parts, verbose=False)]
    return []


def classifier(name: str, lr: float) -> ImageClassifier:
    model = timm_model(**MODELS[name], num_classes=CLASSES)
    return ImageClassifier(model, CLASSES, optim=OptimConfig(lr=lr))


def test_accuracy(module: ImageClassifier) -> float:
    """In percent, on the target domain."""
    metrics = trainer().test(module, datamodule=DigitsDataModule("target"), verbose=False)
    return 100 * metrics[0]["test/acc"]


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


if __name__ == "__main__":
    main()
