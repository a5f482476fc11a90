"""The accents of recipe=accent_espeak: every method over three seeds, PEFT on the same model and data.

python -m benchmarks.accents               goes on where it was stopped
python -m benchmarks.accents --table       what is there

Rates and LoRA's options are those of benchmarks.tune_accents, chosen on the validation speakers; the test
speakers and sentences are met here alone. Each run ends with its last epoch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import peft
import torch

import lora_lightning as ll
from benchmarks.fits import quiet, trainer
from lora_lightning.data.accents import VOCABULARY, AccentsDataModule
from lora_lightning.models.ctc import conformer_ctc
from lora_lightning.tasks.ctc import SpeechRecognizer
from lora_lightning.tasks.error_rates import error_rate
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.trainer.state_dict import keep_trained_only
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results" / "accents.json"
ACCENTS = ("scottish", "caribbean")
SEEDS = (0, 1, 2)
EPOCHS = 10
BATCH_SIZE = 16
LORA: dict[str, Any] = {
    "rank": 16,
    "target_modules": "all",
    "train_norm": "both",
    "modules_to_save": ["head", "conv_module.sequential.2"],  # depthwise: smaller than an update of it
}
RATES = {"probe": 2e-2, "lora": 5.6e-3, "peft": 2.8e-3, "full": 7e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    quiet()
    done = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if not given.table:
        plan = [
            (a, m, s) for s in SEEDS for a in ACCENTS for m in ("before", "lora", "full", "probe", "peft")
        ]
        for accent, method, seed in working(plan, "accents", "runs"):
            if any((r["accent"], r["method"], r["seed"]) == (accent, method, seed) for r in done):
                continue
            if method == "before" and seed:
                continue
            done.append(run(accent, method, seed))
            write(done)
    print(table(done))


def run(accent: str, method: str, seed: int) -> dict[str, Any]:
    """Train by one method, and test: error rates of the accent and of US English, in percent."""
    data = AccentsDataModule(accent, batch_size=BATCH_SIZE, seed=seed)
    task, seconds, trained = train(data, method, RATES.get(method, 0.0))
    tested = trainer().test(task, datamodule=data, verbose=False)[0]
    result = {"accent": accent, "method": method, "seed": seed, "seconds": seconds, "trained": trained}
    result |= {name: 100 * tested[f"test/{name}"] for name in ("wer", "cer", "wer_us")}
    interval = error_rate([t for t in task.transcripts if t.accent == accent])
    result["interval"] = [100 * interval.low, 100 * interval.high]
    if method == "lora":
        with tempfile.TemporaryDirectory() as folder:
            ll.save_adapter(task, folder)
            result["file"] = sum(f.stat().st_size for f in Path(folder).iterdir())
    print(json.dumps(result), flush=True)
    return result


def train(
    data: AccentsDataModule, method: str, lr: float, lora: dict[str, Any] | None = None
) -> tuple[SpeechRecognizer, float, int]:
    """The task after its last epoch, validated; CPU seconds of fitting; trained parameters.

    Args:
        lora: LoRA's options, LORA by default.
    """
    lora = LORA if lora is None else lora
    L.seed_everything(data.seed, verbose=False)
    model: Any = conformer_ctc(VOCABULARY, checkpoint="conformer_us")
    if method == "peft":
        model = peft.get_peft_model(model, peft_config(model, lora))
    task = SpeechRecognizer(model, VOCABULARY, OptimConfig(lr=lr or 1e-3), kept=data.kept)
    if method == "before":
        return task, 0.0, 0
    callbacks = [ll.LoRACallback(ll.LoRAConfig(**lora), verbose=False)] if method == "lora" else []
    if method == "probe":
        ll.linear_probe(task)
        keep_trained_only(task)
    fitter = trainer(
        max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS, callbacks=callbacks, gradient_clip_val=5.0
    )
    start = time.process_time()  # one thread: what it would take on a core of its own
    fitter.fit(task, datamodule=data)
    return task, time.process_time() - start, sum(p.numel() for p in task.parameters() if p.requires_grad)


def peft_config(model: torch.nn.Module, lora: dict[str, Any]) -> peft.LoraConfig:
    """PEFT on the same layers, with the same modules trained in full."""
    saved = lora["modules_to_save"]
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.MultiheadAttention))
        and not name.endswith(("out_proj", *saved))  # out_proj belongs to its attention
    ]
    norms = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.BatchNorm1d))]
    rank = lora["rank"]
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=layers, modules_to_save=[*saved, *norms]
    )


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds that are there."""
    rows = []
    for accent in ACCENTS:
        for method in ("before", "probe", "lora", "peft", "full"):
            of = [r for r in runs if (r["accent"], r["method"]) == (accent, method)]
            if of:
                cells = [spread([r[name] for r in of]) for name in ("wer", "cer", "wer_us", "seconds")]
                rows.append((accent, method, len(of), *cells, f"{of[0]['trained']:,}"))
    return format_table(
        ("accent", "method", "seeds", "WER %", "CER %", "us WER %", "CPU seconds", "trained"), rows
    )


def write(runs: list[dict[str, Any]]) -> None:
    about = {
        "lora": LORA,
        "rates": RATES,
        "epochs": EPOCHS,
        "torch": torch.__version__,
        "peft": peft.__version__,
    }
    RESULTS.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
