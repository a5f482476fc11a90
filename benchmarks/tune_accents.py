"""Tunes recipe=accent_espeak: rates of each method and LoRA's options, on validation speakers alone.

python -m benchmarks.tune_accents          goes on where it was stopped
python -m benchmarks.tune_accents --table  what is there

Each method gets as many learning rates, and the same epochs, batches and seed, on the Scottish utterances.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.accents import BATCH_SIZE, EPOCHS, LORA, train
from benchmarks.fits import quiet
from lora_lightning.report import format_table
from lora_lightning.tasks.error_rates import error_rate

RESULTS = Path(__file__).parent / "results" / "tune_accents.json"
ACCENT = "scottish"
RATES = {  # by factors of two; no best rate is at an edge
    "lora": (8e-3, 4e-3, 1.6e-2, 2e-3),
    "full": (2e-3, 1e-3, 4e-3, 5e-4),
    "probe": (2e-2, 1e-2, 4e-2, 8e-2),
}
VARIANTS: dict[str, dict[str, Any]] = {  # at LoRA's best rate
    "rank 16": {"rank": 16},
    "norms and statistics": {"train_norm": "both"},
    "auto: without the first convolutions": {"target_modules": "auto"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    quiet()
    done = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if not parser.parse_args().table:
        for i in range(max(map(len, RATES.values()))):
            for method, rates in RATES.items():
                if i < len(rates):
                    tried(done, method, rates[i], "")
        best = min((r for r in done if r["method"] == "lora" and not r["variant"]), key=lambda r: r["wer"])
        for variant in VARIANTS:
            tried(done, "lora", best["lr"], variant)
    rows = [
        (r["method"], r["variant"], f"{r['lr']:g}", f"{r['wer']:.1f}", f"{r['cer']:.1f}", f"{r['trained']:,}")
        for r in sorted(done, key=lambda r: (r["method"], r["variant"], r["lr"]))
    ]
    print(format_table(("method", "variant", "lr", "val WER %", "val CER %", "trained"), rows))


def tried(done: list[dict[str, Any]], method: str, lr: float, variant: str) -> None:
    """Train once, unless that is done, and write down the error rates of the validation speakers."""
    if any((r["method"], r["lr"], r["variant"]) == (method, lr, variant) for r in done):
        return
    lora = {**LORA, **VARIANTS.get(variant, {})}
    task, seconds, trained = train(ACCENT, method, lr, 0, lora)
    heard = [t for t in task.transcripts if t.accent == ACCENT]
    wer, cer = (100 * error_rate(heard, unit).rate for unit in ("word", "character"))
    done.append(
        {
            "method": method,
            "variant": variant,
            "lr": lr,
            "wer": wer,
            "cer": cer,
            "trained": trained,
            "seconds": seconds,
        }
    )
    print(json.dumps(done[-1]), flush=True)
    about = {
        "accent": ACCENT,
        "lora": LORA,
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "torch": torch.__version__,
    }
    RESULTS.write_text(json.dumps({**about, "runs": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
