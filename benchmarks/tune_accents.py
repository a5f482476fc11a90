"""Tunes recipe=accent_espeak: the rate of each method and LoRA's options, without the test speakers.

python -m benchmarks.tune_accents          goes on where it was stopped
python -m benchmarks.tune_accents --table  what is there

Trained on six of the eight training speakers of an accent, and judged by the word error rate of the two
others and of the validation speakers, who are harder to understand, over both accents. Each method gets as
many learning rates, and the same epochs, batches and seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.accents import ACCENTS, BATCH_SIZE, EPOCHS, LORA, train
from benchmarks.fits import quiet
from lora_lightning.data.accents import AccentsDataModule
from lora_lightning.tasks.error_rates import Transcript, error_rate
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results" / "tune_accents.json"
LEFT_OUT = ("m4", "f3")
RATES = {  # by factors of two, or of its root
    "lora": (2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3),
    "peft": (2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3),
    "full": (7e-4, 1e-3, 1.4e-3, 2e-3, 5e-4),
    "probe": (1e-2, 2e-2, 4e-2, 8e-2, 5e-3),
}
VARIANTS: dict[str, dict[str, Any]] = {  # at LoRA's best rate
    "rank 8": {"rank": 8},
    "rank 32": {"rank": 32},
    "norms' statistics frozen": {"train_norm": "affine"},
    "depthwise convolutions by LoRA": {"modules_to_save": ["head"]},
    "biases too": {"train_bias": "all"},
    "auto: without the first convolutions": {"target_modules": "auto"},
}


class LeftOut(AccentsDataModule):
    """Validates on training speakers that are left out of the training, and on the validation speakers."""

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        left_out = [u for u in self.train_set if u.speaker in LEFT_OUT]
        self.train_set = [u for u in self.train_set if u.speaker not in LEFT_OUT]
        self.val_set = left_out + [u for u in self.val_set if u.accent in self.accents]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    quiet()
    done = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if not parser.parse_args().table:
        for i in range(max(map(len, RATES.values()))):
            for method, rates in RATES.items():
                tried(done, method, rates[i], "")
        rates = {r["lr"] for r in done if r["method"] == "lora" and not r["variant"]}
        best = min(rates, key=lambda lr: score(done, "lora", lr, ""))
        for variant in VARIANTS:
            tried(done, "lora", best, variant)
    print(table(done))


def tried(done: list[dict[str, Any]], method: str, lr: float, variant: str) -> None:
    """Train once for each accent, unless that is done, and write down the error rates."""
    for accent in ACCENTS:
        if any(r["accent"] == accent for r in _of(done, method, lr, variant)):
            continue
        data = LeftOut(accent, kept=[], batch_size=BATCH_SIZE)
        task, seconds, trained = train(data, method, lr, {**LORA, **VARIANTS.get(variant, {})})
        done.append(
            {
                "accent": accent,
                "method": method,
                "variant": variant,
                "lr": lr,
                "trained": trained,
                "seconds": seconds,
                **_rates(task.transcripts, "all", lambda t: True),
                **_rates(task.transcripts, "left_out", lambda t: t.speaker in LEFT_OUT),
                **_rates(task.transcripts, "validation", lambda t: t.speaker not in LEFT_OUT),
            }
        )
        print(json.dumps(done[-1]), flush=True)
        about = {"lora": LORA, "epochs": EPOCHS, "batch_size": BATCH_SIZE, "torch": torch.__version__}
        RESULTS.write_text(json.dumps({**about, "runs": done}, indent=1) + "\n")


def _rates(transcripts: list[Transcript], of: str, among: Callable[[Transcript], bool]) -> dict[str, float]:
    heard = [t for t in transcripts if among(t)]
    return {f"{unit}_{of}": 100 * error_rate(heard, unit).rate for unit in ("word", "character")}


def score(done: list[dict[str, Any]], method: str, lr: float, variant: str) -> float:
    """Mean word error rate over the accents."""
    return mean(r["word_all"] for r in _of(done, method, lr, variant))


def _of(done: list[dict[str, Any]], method: str, lr: float, variant: str) -> list[dict[str, Any]]:
    return [r for r in done if (r["method"], r["lr"], r["variant"]) == (method, lr, variant)]


def table(done: list[dict[str, Any]]) -> str:
    """Means over the accents that are there."""
    columns = ("word_all", "word_left_out", "word_validation", "character_all", "seconds")
    rows = []
    for method, variant, lr in sorted({(r["method"], r["variant"], r["lr"]) for r in done}):
        runs = _of(done, method, lr, variant)
        means = (f"{mean(r[column] for r in runs):.1f}" for column in columns)
        rows.append((method, variant, f"{lr:g}", len(runs), *means, f"{runs[0]['trained']:,}"))
    header = ("WER %", "WER left out", "WER validation", "CER %", "CPU seconds", "trained")
    return format_table(("method", "variant", "lr", "accents", *header), rows)


if __name__ == "__main__":
    main()
