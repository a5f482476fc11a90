"""Which alpha keeps LoRA's best rate the same at every rank: ViT and ResNet of the digits, ranks 1 to 32.

python -m benchmarks.rate_by_rank             goes on where it was stopped
python -m benchmarks.rate_by_rank --table     the tables of what is there

For each way to choose the scaling s (all of them are 2 at rank 8) and each rank, rates a factor of two apart
are tried, beginning with the best one of the rank before, until the one with the lowest validation loss has
one on either side; the best rate is the vertex of the parabola through these three, over its logarithm. Every
finished run stands in `results/rate_by_rank.json` and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch

from benchmarks.fits import quiet, trainer
from benchmarks.tune_digits import MODELS, RESULTS, classifier
from lora_lightning import LoRACallback
from lora_lightning.data.digits import DigitsDataModule
from lora_lightning.layers.registry import lora_layers
from lora_lightning.utils.atomic import write_whole

RANKS = (1, 2, 4, 8, 16, 32)
MEETING, SCALING = 8, 2.0  # the rank at which all ways have the same scaling, and that
SCALINGS: dict[str, tuple[str, Callable[[int], float]]] = {  # the label, and s by the rank
    "twice": ("alpha = 2·r (the default): s = 2", lambda rank: SCALING),
    "rslora": ("rsLoRA, alpha / √r: s = 2·√(8 / r)", lambda rank: SCALING * math.sqrt(MEETING / rank)),
    "constant": ("alpha = 16 at every rank: s = 16 / r", lambda rank: SCALING * MEETING / rank),
}
FIRST = {"vit": 4e-3, "resnet": 8e-3}  # the recipes' rates, tuned at rank 16
EPOCHS = 4
SEED = 0
MOST = 9  # rates of one rank at most

Key = tuple[str, int, float, float]  # model, rank, scaling, rate


class Runs:
    """Finished runs, in a file that is written anew after each."""

    def __init__(self, path: Path, run: Callable[[str, int, float, float], dict[str, Any]]) -> None:
        self.path, self.run = path, run
        found = json.loads(path.read_text())["runs"] if path.exists() else []
        self.done: dict[Key, dict[str, Any]] = {_key(r): r for r in found}

    def loss(self, key: Key) -> float:
        """The validation loss, of a run that is done now unless it was; infinite where it is no number."""
        if key not in self.done:
            found = dict(zip(("model", "rank", "scaling", "lr"), key, strict=True)) | self.run(*key)
            self.done[key] = found
            print(json.dumps(found), flush=True)
            self.write()
        loss = self.done[key]["val_loss"]
        return math.inf if loss is None else float(loss)

    def write(self) -> None:
        about = {"epochs": EPOCHS, "seed": SEED, "torch": torch.__version__, "runs": [*self.done.values()]}
        text = json.dumps(about, indent=1) + "\n"
        write_whole(self.path, lambda place: Path(place).write_text(text))


def _key(found: dict[str, Any]) -> Key:
    return found["model"], found["rank"], found["scaling"], found["lr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="train nothing")
    only_table = parser.parse_args().table
    quiet()
    runs = Runs(RESULTS / "rate_by_rank.json", missing if only_table else run)
    lines = []
    for model in MODELS:
        found = {way: dict(best_rates(runs, model, way)) for way in SCALINGS}
        lines += [*table(model, found), ""]
    text = "\n".join(lines)
    (RESULTS / "rate_by_rank.md").write_text(text)
    print(text)


def best_rates(
    runs: Runs, model: str, way: str, ranks: tuple[int, ...] = RANKS
) -> Iterator[tuple[int, float]]:
    """Rank and best rate, outwards from the rank at which all ways are the same; without ranks of which runs
    are missing."""
    middle = ranks.index(min(ranks, key=lambda r: abs(math.log2(r / MEETING))))
    for side in (ranks[middle:], ranks[:middle][::-1]):
        near = FIRST[model]
        for rank in side:
            scaling = round(SCALINGS[way][1](rank), 6)
            try:
                best = best_rate(lambda lr, r=rank, s=scaling: runs.loss((model, r, s, lr)), near)  # type: ignore[misc]
            except LookupError:
                break
            near = on_grid(best, FIRST[model])
            yield rank, best


def on_grid(lr: float, first: float) -> float:
    """The nearest rate that is a power of two times the first."""
    return _written(first * 2.0 ** round(math.log2(lr / first)))


def _written(lr: float) -> float:
    return float(f"{lr:.6g}")


def best_rate(loss: Callable[[float], float], start: float) -> float:
    """The rate of the lowest loss, between those tried by a parabola over its logarithm."""
    losses = {start: loss(start)}
    while len(losses) < MOST:
        best = min(losses, key=lambda lr: (losses[lr], lr))
        missing = [lr for lr in (_written(best / 2), _written(best * 2)) if lr not in losses]
        if not missing:
            return best * 2 ** vertex(*(losses[_written(best * f)] for f in (0.5, 1, 2)))
        losses[missing[0]] = loss(missing[0])
    return min(losses, key=lambda lr: (losses[lr], lr))


def vertex(left: float, middle: float, right: float) -> float:
    """Where the parabola through the values at -1, 0 and 1 is lowest, which is at 0 of the three."""
    bend = left - 2 * middle + right
    return 0.0 if not 0 < bend < math.inf else (left - right) / (2 * bend)


class Scaled(L.Callback):
    """Gives every layer the same scaling, also those with a smaller rank, for want of rows."""

    def __init__(self, scaling: float) -> None:
        self.scaling = scaling

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for layer in lora_layers(pl_module).values():
            for update in layer.updates("default"):
                update.scaling = self.scaling


def run(model: str, rank: int, scaling: float, lr: float) -> dict[str, Any]:
    """Train on the target domain, and validate after the last epoch. Accuracy in percent."""
    L.seed_everything(SEED, verbose=False)
    module = classifier(model, lr)
    adapt = LoRACallback(rank=rank, target_modules="all", verbose=False)
    fitter = trainer(callbacks=[adapt, Scaled(scaling)], max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS)
    fitter.fit(module, datamodule=DigitsDataModule("target", seed=SEED))
    metrics = {name: value.item() for name, value in fitter.callback_metrics.items()}
    loss = metrics["val/loss"]
    return {
        "val_loss": loss if math.isfinite(loss) else None,
        "val_acc": 100 * metrics["val/acc"],
        "train_loss": metrics["train/loss"] if math.isfinite(metrics["train/loss"]) else None,
    }


def missing(model: str, rank: int, scaling: float, lr: float) -> dict[str, Any]:
    """In the place of `run` where nothing is to be trained."""
    raise LookupError(f"{model}, rank {rank}, s = {scaling:g}, rate {lr:g}")


def exponent(rates: dict[int, float]) -> tuple[float, float]:
    """e of best rate ~ rank^e, by least squares, and its standard error; 0 where it does not depend on it."""
    x, y = [math.log2(r) for r in rates], [math.log2(lr) for lr in rates.values()]
    x, y = [a - mean(x) for a in x], [b - mean(y) for b in y]
    spread = sum(a * a for a in x)
    e = sum(a * b for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - e * a) ** 2 for a, b in zip(x, y, strict=True))
    return e, math.sqrt(left / max(len(x) - 2, 1) / spread)


def table(model: str, found: dict[str, dict[int, float]]) -> list[str]:
    """The best rate by the rank for each way, by what factor the rates lie apart, and the rank's exponent."""
    head = [MODELS[model]["name"], *(f"r = {rank}" for rank in RANKS), "highest / lowest", "exponent"]
    lines = [head, ["---"] * len(head)]
    for way, rates in found.items():
        cells = [f"{rates[rank]:.1e}" if rank in rates else "" for rank in RANKS]
        whole = len(rates) > 1
        apart = f"{max(rates.values()) / min(rates.values()):.1f}" if whole else ""
        fitted = "{:+.2f} ± {:.2f}".format(*exponent(rates)) if whole else ""
        lines.append([SCALINGS[way][0], *cells, apart, fitted])
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
