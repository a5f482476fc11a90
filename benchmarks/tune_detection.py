"""Tunes the recipes of drawn shapes: the learning rate of each method, by the validation pictures alone.

python -m benchmarks.tune_detection --model fcos
python -m benchmarks.tune_detection --model fasterrcnn

Each method gets as many learning rates, and the same epochs, batches and pictures. The rate with the best
validation mAP of seed 0 is chosen, and trained with two more seeds; only the models of the chosen rates
meet the test pictures. PEFT has LoRA's rank, layers and heads. Runs that are in the results file already are
not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch

from benchmarks.fits import quiet, trainer
from lora_lightning import LoRACallback, LoRAConfig, inject, linear_probe, lora_parameters
from lora_lightning.data.shapes import ShapesDataModule
from lora_lightning.models.detection import detector
from lora_lightning.tasks.detection import SCORES, ObjectDetector
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.utils.tables import format_table

Tested = tuple[L.LightningModule, L.LightningDataModule]
RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
EPOCHS = 8
AREA_SCALE = 4.0
CLIP = 5.0
LORA: dict[str, dict[str, Any]] = {
    "fcos": {"rank": 8, "detector_part": "all", "train_norm": "stats"},
    "fasterrcnn": {"rank": 16, "target_modules": "all", "train_norm": "both", "train_bias": "all"},
}
RATES = {  # evenly spaced in the logarithm, and then one more beside the best
    "probe": (3e-3, 1e-2, 3e-2, 1e-1),
    "lora": (3e-3, 8e-3, 2e-2, 5e-3),
    "peft": (3e-3, 8e-3, 2e-2, 5e-3),
    "full": (1e-3, 3e-3, 8e-3, 5e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("fcos", "fasterrcnn"), required=True)
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=RATES)
    options = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore")  # torchvision's and faster-coco-eval's too
    path = RESULTS / f"tune_detection_{options.model}.json"
    found = json.loads(path.read_text()) if path.exists() else {"before": before(options.model), "runs": []}

    kept: dict[tuple[str, float, int], Tested] = {}

    def trained(method: str, lr: float, seed: int) -> dict[str, Any]:
        for run in found["runs"]:
            if (run["method"], run["lr"], run["seed"]) == (method, lr, seed):
                return run
        run, kept[method, lr, seed] = train(options.model, method, lr, seed)
        found["runs"].append(run)
        path.write_text(json.dumps(found, indent=1) + "\n")
        return run

    for method in options.methods:
        best = max((trained(method, lr, SEEDS[0]) for lr in RATES[method]), key=lambda run: run["val"])["lr"]
        for seed in SEEDS:
            run = trained(method, best, seed)
            if not run["test"]:
                if (method, best, seed) not in kept:  # trained by an earlier process
                    found["runs"].remove(run)
                    run = trained(method, best, seed)
                run["test"] = trainer().test(*kept[method, best, seed], verbose=False)[0]
                path.write_text(json.dumps(found, indent=1) + "\n")
    found |= {
        "lora": LORA[options.model],
        "epochs": EPOCHS,
        "pictures": ShapesDataModule().train_set.size,
        "torch": torch.__version__,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def before(model: str) -> dict[str, float]:
    return trainer().test(task(model), ShapesDataModule(), verbose=False)[0]


def train(model: str, method: str, lr: float, seed: int) -> tuple[dict[str, Any], Tested]:
    """Train on the target domain, and validate after the last epoch."""
    L.seed_everything(seed, verbose=False)
    module = task(model, lr)
    lora = LoRAConfig(**LORA[model])
    callbacks = [LoRACallback(lora, verbose=False)] if method == "lora" else []
    if method == "probe":
        linear_probe(module)
    if method == "peft":
        module = task(model, lr, adapt=lambda net: peft_model(net, lora))
    fitter = trainer(
        callbacks=callbacks, max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS, gradient_clip_val=CLIP
    )
    data, start = ShapesDataModule(seed=seed), time.process_time()
    fitter.fit(module, datamodule=data)
    run = {
        "method": method,
        "lr": lr,
        "seed": seed,
        "val": fitter.callback_metrics["val/map"].item(),
        "cpu_seconds": time.process_time() - start,
        "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "test": {},
    }
    print(f"{model} {method} lr={lr:g} seed={seed}: validation {100 * run['val']:.1f}", flush=True)
    return run, (module, data)


def task(model: str, lr: float = 1e-3, adapt: Any = lambda net: net) -> ObjectDetector:
    facts = ShapesDataModule.provides
    net = adapt(detector(f"{model}_small", facts["num_classes"], checkpoint=f"{model}_shapes"))
    return ObjectDetector(net, **facts, optim=OptimConfig(lr=lr), area_scale=AREA_SCALE)


def peft_model(net: torch.nn.Module, lora: LoRAConfig) -> torch.nn.Module:
    """PEFT with the very layers that LoRA has here, and what it trains in full, in the plain detector."""
    from peft import LoraConfig, inject_adapter_in_model

    ours = copy.deepcopy(net)
    layers = inject(ours, lora).layers
    updates = {id(p) for p in lora_parameters(ours)}
    in_full = {n for n, p in ours.named_parameters() if p.requires_grad and id(p) not in updates}
    parameters = dict(net.named_parameters())
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank,
        target_modules="|".join(re.escape(layer.name) for layer in layers),
    )
    inject_adapter_in_model(config, net)
    for name in in_full:  # PEFT names modules to save by their endings, which are not unique here
        parameters[name].requires_grad_(True)
    return net


def table(found: dict[str, Any]) -> str:
    """Test scores of the chosen rates, mean and standard deviation over the seeds."""
    rows = [("before", "", *(_percent([found["before"].get(f"test/{s.name}")]) for s in SCORES), "0", "0")]
    for method in RATES:
        tested = [run for run in found["runs"] if run["method"] == method and run["test"]]
        if tested:
            scores = (_percent([run["test"].get(f"test/{s.name}") for run in tested]) for s in SCORES)
            seconds = mean(run["cpu_seconds"] for run in tested)
            rows.append(
                (method, f"{tested[0]['lr']:g}", *scores, f"{tested[0]['trained']:,}", f"{seconds:.0f}")
            )
    return format_table(("method", "lr", *(s.label for s in SCORES), "trained", "CPU s"), rows)


def _percent(values: list[float | None]) -> str:
    known = [100 * v for v in values if v is not None]
    spread = f" ± {stdev(known):.1f}" if len(known) > 1 else ""
    return f"{mean(known):.1f}{spread}" if known else "–"


if __name__ == "__main__":
    main()
