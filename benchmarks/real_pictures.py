"""Methods of fine-tuning on a real pretrained network and real pictures: EfficientNet-Lite0 of ImageNet on
Fashion-MNIST, 100 or 10 pictures a class.

python -m benchmarks.real_pictures           goes on where it was stopped
python -m benchmarks.real_pictures --table   the table of what is there

The rate of each method is chosen on validation pictures, with one seed, from as many rates for each, and more
beside the best while that is at an edge; then five seeds are trained at it, and only these meet the test
pictures. Every finished run is a line of `results/real_pictures.jsonl` and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.fits import quiet
from benchmarks.measure import keep_memory
from benchmarks.real_files import SHA256, require_files
from benchmarks.real_methods import EPOCHS, LORA, METHODS, SIZE, TEST, VALIDATION, before, run
from lora_lightning.errors import UserError
from lora_lightning.utils.progress import working

RESULTS = Path(__file__).parent / "results"
FACTOR = 10**0.5
SEEDS = (0, 1, 2, 3, 4)
WIDER = 3  # rates beyond the first ones at most
FIRST = ("probe", "lora_8", "full", "peft_8")  # what matters most is trained first
ORDER = [(100, FIRST), (10, FIRST), (100, tuple(METHODS)), (10, tuple(METHODS))]

Test = Callable[[], dict[str, float]]


class Runs:
    """Finished runs, each a line of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.done: dict[tuple[int, str, float, int], dict[str, Any]] = {}
        for found in map(json.loads, lines):
            self.done[_key(found)] = found  # the later line is the tested one
        self._tests: dict[tuple[int, str, float, int], Test] = {}

    def trained(self, shots: int, method: str, lr: float, seed: int, tested: bool = False) -> dict[str, Any]:
        """The run, trained now unless it is done; `tested`: on the test pictures too."""
        key = (shots, method, lr, seed)
        if key not in self.done or (tested and "test" not in self.done[key] and key not in self._tests):
            found, self._tests[key] = run(*key)
            self._write(found)
        if tested and "test" not in self.done[key]:
            self._write(self.done[key] | self._tests[key]())
        if tested:
            self._tests.pop(key, None)
        return self.done[key]

    def forget(self, shots: int, method: str, but: float) -> None:
        """Let go of models of rates that were not chosen."""
        for key in [k for k in self._tests if k[:2] == (shots, method) and k[2] != but]:
            del self._tests[key]

    def _write(self, found: dict[str, Any]) -> None:
        self.done[_key(found)] = found
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


def _key(found: dict[str, Any]) -> tuple[int, str, float, int]:
    return found["shots"], found["method"], found["lr"], found["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore")  # PEFT's
    keep_memory()
    runs = Runs(RESULTS / "real_pictures.jsonl")
    try:
        if not options.table:
            require_files()
            for shots, methods in working(ORDER, "training", "comparisons"):
                train(runs, shots, methods)
        write(runs)
    except UserError as error:
        sys.exit(str(error))


def train(runs: Runs, shots: int, methods: tuple[str, ...]) -> None:
    """Tune each method, then train seed by seed, so that what is stopped has as many of each."""
    chosen = {}
    for method in methods:
        chosen[method] = tune(runs, shots, method)
        runs.forget(shots, method, chosen[method])
        runs.trained(shots, method, chosen[method], SEEDS[0], tested=True)
    for seed, method in product(SEEDS[1:], methods):
        runs.trained(shots, method, chosen[method], seed, tested=True)


def tune(runs: Runs, shots: int, method: str) -> float:
    """The rate with the best validation accuracy of the first seed, the smaller one of two; where it is at an
    edge, the next beyond that is tried too."""
    rates = sorted(METHODS[method].rates)
    for _ in range(WIDER + 1):
        scores = {lr: runs.trained(shots, method, lr, SEEDS[0])["val"] for lr in rates}
        best = max(rates, key=lambda lr: (scores[lr], -lr))
        if best not in (rates[0], rates[-1]):
            return best
        rates = sorted([*rates, _rounded(best / FACTOR if best == rates[0] else best * FACTOR)])
    return best


def _rounded(lr: float) -> float:
    return float(f"{lr:.0e}")


def write(runs: Runs) -> None:
    """The tables as markdown, and everything as JSON."""
    done = list(runs.done.values())
    about = {
        "model": "tf_efficientnet_lite0",
        "pixels": SIZE,
        "epochs": EPOCHS,
        "validation": VALIDATION,
        "test": TEST,
        "lora": LORA,
        "torch": torch.__version__,
        "sha256": SHA256,
    }
    path = RESULTS / "real_pictures.json"
    found = json.loads(path.read_text()) if path.exists() else {"before": before()}
    path.write_text(json.dumps(found | about | {"runs": done}, indent=1) + "\n")
    text = "\n".join(tables(done, found["before"]))
    (RESULTS / "real_pictures.md").write_text(text + "\n")
    print(text)


def tables(done: list[dict[str, Any]], untrained: float) -> list[str]:
    """A table for each number of pictures a class that something was trained on."""
    lines = []
    for shots in EPOCHS:
        rows: list[tuple[str, ...]] = [("before, a fresh head", "", f"{untrained:.1f}", "0", "0")]
        for name, method in METHODS.items():
            tested = [r for r in done if (r["shots"], r["method"]) == (shots, name) and "test" in r]
            if tested:
                rows += _rows(method.label, tested)
        if len(rows) == 1:
            continue
        head = ("", "rate", "test accuracy %", "trained", "CPU s")
        lines += [f"{shots} pictures a class, {EPOCHS[shots]} epochs:", "", markdown(head, rows), ""]
    return lines


def _rows(label: str, tested: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rate, trained = f"{tested[0]['lr']:g}", f"{tested[0]['trained']:,}"
    seconds = f"{mean(r['cpu_seconds'] for r in tested):.0f}"
    rows: list[tuple[str, ...]] = [(label, rate, spread([r["test"] for r in tested]), trained, seconds)]
    if "reloaded" in tested[0]:
        rows.append(
            (f"{label}, saved and loaded", rate, spread([r["reloaded"] for r in tested]), trained, "")
        )
    return rows


def spread(values: list[float]) -> str:
    """Mean and standard deviation, and over how many seeds where they are not all."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}" + (
        "" if len(values) == len(SEEDS) else f" ({len(values)} of {len(SEEDS)} seeds)"
    )


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
