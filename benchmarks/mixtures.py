"""A third accent between two known ones: a mixture of their adapters against training anew, and training on.

python -m lora_lightning.data.espeak_corpus CORPUS --accents westmidlands --tested --train 100 --val 60
python -m benchmarks.mixtures --corpus CORPUS    goes on where it was stopped
python -m benchmarks.mixtures --table            what is there

The adapters are those of benchmarks.accents, of Scottish and of Caribbean English. Each way gets as many
rates, of which the validation speakers of the third accent choose one, and is tested at that. One seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lightning as L

import lora_lightning as ll
from benchmarks.accents import ACCENTS, BATCH_SIZE, LORA, train
from benchmarks.accents import RATES as TUNED
from benchmarks.fits import quiet, trainer
from lora_lightning.data.accents import VOCABULARY, AccentsDataModule
from lora_lightning.models.ctc import conformer_ctc
from lora_lightning.tasks.ctc import SpeechRecognizer
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results" / "mixtures.json"
ACCENT, SIZES, EPOCHS = "westmidlands", (20,), 10
RATES = {  # of what trains; without one nothing does
    "the nearer adapter, as it is": (0.0,),
    "equal weights": (0.0,),
    "mixture": (1e-3, 4e-3, 1.6e-2),
    "equal weights, heads and norms trained": (1e-3, 4e-3, 1.6e-2),
    "LoRA anew": (1.4e-3, 2.8e-3, 5.6e-3),
    "the nearer adapter, trained on": (3.5e-4, 7e-4, 1.4e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--adapters", type=Path, default=Path("outputs/mixtures"), help="kept here")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    quiet()
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if not given.table:
        sources(given.adapters)
        for size in SIZES:
            for way, rates in RATES.items():
                for rate in rates:
                    if not any((r["size"], r["way"], r["rate"]) == (size, way, rate) for r in done):
                        done.append(run(given, size, way, rate))
                        RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    print(table(done))


def sources(folder: Path) -> None:
    """Train the two adapters, unless they are there."""
    for accent in ACCENTS:
        if not (folder / accent).exists():
            data = AccentsDataModule(accent, batch_size=BATCH_SIZE, kept=[], seed=0)
            ll.save_adapter(train(data, "lora", TUNED["lora"])[0], folder / accent)


def run(given: argparse.Namespace, size: int, way: str, rate: float) -> dict[str, Any]:
    """Word error rates of the validation and the test speakers, in percent, after one way."""
    L.seed_everything(0, verbose=False)
    data = AccentsDataModule(
        ACCENT, kept=[], train_size=size, batch_size=BATCH_SIZE, root=str(given.corpus), seed=0
    )
    model = conformer_ctc(VOCABULARY, checkpoint="conformer_us")
    task = SpeechRecognizer(model, VOCABULARY, OptimConfig(lr=rate or 1e-3), kept=[])
    nearer, other = ACCENTS
    adapter = nearer
    if way == "LoRA anew":
        adapter = "new"
        ll.inject(task, ll.LoRAConfig(**LORA), adapter)
    else:
        for accent in (nearer, other):
            ll.load_adapter(task, given.adapters / accent, adapter=accent)
    frozen = way == "equal weights, heads and norms trained"
    if way in ("equal weights", "mixture") or frozen:
        adapter = "both"
        ll.mixture(task, [nearer, other], adapter)
    ll.set_adapter(task, adapter)
    for parameter in ll.lora_parameters(task) if frozen else ():
        parameter.requires_grad_(False)
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    if rate:
        adapting = [] if frozen else [ll.LoRACallback(adapter=adapter, verbose=False)]
        fitter = trainer(
            max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS, gradient_clip_val=5.0, callbacks=adapting
        )
        fitter.fit(task, datamodule=data)
    result = {"size": size, "way": way, "rate": rate, "trained": trained if rate else 0}
    for part in ("val", "test"):
        check = trainer().validate if part == "val" else trainer().test
        result[part] = 100 * check(task, datamodule=data, verbose=False)[0][f"{part}/wer"]
    print(json.dumps(result), flush=True)
    return result


def table(runs: list[dict[str, Any]]) -> str:
    """Each way at the rate that the validation speakers have chosen."""
    rows = []
    for size in SIZES:
        for way in RATES:
            if of := [r for r in runs if (r["size"], r["way"]) == (size, way)]:
                best = min(of, key=lambda r: r["val"])
                rows.append((size, way, f"{best['rate']:g}", f"{best['val']:.1f}", f"{best['test']:.1f}"))
    return format_table(("utterances", "way", "rate", "WER % of validation", "WER % of test"), rows)


if __name__ == "__main__":
    main()
