"""A real network, adapted, compressed and fine-tuned: EfficientNet-Lite0 of ImageNet on Fashion-MNIST, 100
pictures a class.

    python -m benchmarks.compression_pictures          goes on where it was stopped
    python -m benchmarks.compression_pictures --table  what is there

LoRA as `real_pictures` tuned it; its updates in the weights; half of the parameters, by training pictures;
then every parameter on these, the statistics of norms frozen. The rate of that is chosen with the first seed,
by validation pictures; all seeds meet the same test pictures. A finished seed is a row of
`results/compression_pictures.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch

import lora_lightning as ll
from benchmarks.fits import FrozenStatistics, quiet, trainer
from benchmarks.measure import keep_memory
from benchmarks.methods.statistics import interval
from benchmarks.real_files import fashion, require_files
from benchmarks.real_methods import CLASSES, EPOCHS, WARMUP, Batches, accuracy, prepare, prepared, sets
from benchmarks.real_pictures import markdown
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.tasks.optim_config import OptimConfig

RESULTS = Path(__file__).parent / "results" / "compression_pictures.json"
SHOTS, SEEDS = 100, (0, 1, 2)
METHOD, RATE = "lora_8", 3e-3
SHARE, DATA = 0.5, 300  # of the parameters; pictures that compress looks at
FINE_RATES, FINE_EPOCHS = (1e-4, 3e-4, 1e-3), 2
TEST = 3000
STAGES = ("adapted", "compressed", "fine-tuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rates": {}, "rows": []}
    if not parser.parse_args().table:
        quiet()
        warnings.filterwarnings("ignore", module="lightning")
        keep_memory()
        require_files()
        for row in measured(found):
            print(json.dumps(row), flush=True)
            found["rows"].append(row)
            RESULTS.write_text(json.dumps({"torch": torch.__version__, **found}, indent=1) + "\n")
    print(table(found["rows"]))


def measured(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row of each seed that is not known; validation accuracies of the rates go into `found`."""
    images, labels = fashion("t10k")
    tested = images[None, :TEST], labels[:TEST]
    known = {row["seed"] for row in found["rows"]}
    for seed in (s for s in SEEDS if s not in known):
        network = adapted(seed)
        row: dict[str, Any] = {"seed": seed, "parameters": size(network)}
        row["adapted"] = accuracy(network, tested)
        told = ll.compress(network, parameters=SHARE, data=[*shown().split(50)])
        row |= {"left": size(network), "flops": told.flops, "compressed": accuracy(network, tested)}
        trained: dict[float, torch.nn.Module] = {}
        for rate in FINE_RATES if seed == SEEDS[0] else ():
            trained[rate] = fine_tuned(network, rate, seed)
            found["rates"][f"{rate:g}"] = accuracy(trained[rate], sets(SHOTS)["val"])
        rate = max(FINE_RATES, key=lambda r: (found["rates"][f"{r:g}"], -r))
        best = trained.get(rate) or fine_tuned(network, rate, seed)
        yield row | {"rate": rate, "fine-tuned": accuracy(best, tested)}


def adapted(seed: int) -> torch.nn.Module:
    """The network with its updates in its weights."""
    L.seed_everything(seed, verbose=False)
    task, callbacks = prepare(METHOD, RATE)
    fit(task, callbacks, EPOCHS[SHOTS])
    ll.eject(task, merged=True)
    return task.model.eval()


def fine_tuned(network: torch.nn.Module, rate: float, seed: int) -> torch.nn.Module:
    """A copy all of whose parameters were trained at a rate."""
    L.seed_everything(seed, verbose=False)
    optim = OptimConfig(lr=rate, schedule={"warmup": WARMUP})
    task = ImageClassifier(copy.deepcopy(network).requires_grad_(), CLASSES, optim=optim)
    fit(task, [FrozenStatistics()], FINE_EPOCHS)
    return task.model


def fit(task: ImageClassifier, callbacks: list[L.Callback], epochs: int) -> None:
    """Train on the training pictures."""
    fitter = trainer(callbacks=callbacks, max_epochs=epochs, limit_val_batches=0)
    fitter.fit(task, Batches(*sets(SHOTS)["train"], shuffle=True))


def shown() -> torch.Tensor:
    """Training pictures, evenly of all classes."""
    views, _ = sets(SHOTS)["train"]
    return prepared(views[0][:: len(views[0]) // DATA])


def size(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/compression.md shows it: each stage beside the adapted one of the same seed."""
    cells = []
    for stage in STAGES:
        scores = [row[stage] for row in rows]
        change = interval([row[stage] - row["adapted"] for row in rows])
        left = mean(row["parameters" if stage == "adapted" else "left"] for row in rows)
        away = "" if stage == "adapted" else f"{change.mean:+.1f} [{change.low:+.1f}, {change.high:+.1f}]"
        cells.append((stage, f"{left / 1e6:.2f}", f"{mean(scores):.1f} ± {stdev(scores):.1f}", away))
    return markdown(("", "parameters, millions", "accuracy %", "against adapted"), cells)


if __name__ == "__main__":
    main()
