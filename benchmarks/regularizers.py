"""What terms of the loss keep of the source on the digits: accuracy on it and on the target, over λ.

    python -m benchmarks.regularizers

The recipe `vit_digits` at its tuned rate, the last epoch's model, three seeds. Writes
results/regularizers.json after each run, and goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from itertools import product
from statistics import mean, stdev
from typing import Any

import lightning as L

from benchmarks.fits import quiet, trainer
from benchmarks.tune_digits import EPOCHS, LORA, RESULTS, SEEDS, classifier
from lora_lightning import LoRACallback
from lora_lightning.data.digits import DigitsDataModule
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import format_table

RATE = 4e-3
TERMS: dict[str, dict[str, float]] = {
    "none": {},
    "frobenius 1e-2": {"frobenius": 1e-2},
    "frobenius 1e-1": {"frobenius": 1e-1},
    "outputs 0.1": {"outputs": 0.1},
    "outputs 1": {"outputs": 1.0},
}
SCORES = ("target", "source", "seconds")


def main() -> None:
    quiet()
    path = RESULTS / "regularizers.json"
    runs: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for seed, name in working(list(product(SEEDS, TERMS)), "training", "runs"):
        key = f"{name}, seed {seed}"
        if key not in runs:
            runs[key] = run(TERMS[name], seed)
            path.write_text(json.dumps(runs, indent=1) + "\n")
            print(key, runs[key], flush=True)
    rows = [
        (name, *(spread([runs[f"{name}, seed {s}"][score] for s in SEEDS]) for score in SCORES))
        for name in TERMS
    ]
    print("\n" + format_table(("terms", "target %", "source %", "seconds"), rows))


def run(weights: dict[str, float], seed: int) -> dict[str, float]:
    """Scores on the test images, in percent, and the terms at the end of the training."""
    L.seed_everything(seed, verbose=False)
    module, data = classifier("vit", RATE), DigitsDataModule("target", seed=seed)
    callback = LoRACallback(verbose=False, regularizer=weights, **LORA)
    fitter = trainer(callbacks=[callback], max_epochs=EPOCHS, limit_val_batches=0)
    start = time.process_time()
    fitter.fit(module, datamodule=data)
    seconds = time.process_time() - start
    ended: Any = {n: float(v) for n, v in fitter.callback_metrics.items() if n.startswith("regularizer")}
    scores = trainer().test(module, datamodule=data, verbose=False)[0]
    return {
        "target": 100 * scores["test/acc"],
        "source": 100 * scores["test/source"],
        "seconds": seconds,
        **ended,
    }


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


if __name__ == "__main__":
    main()
