"""What a base in 8 or 4 bits costs in accuracy: the digits ViT, five seeds, PEFT on bitsandbytes' layers too.

    python -m benchmarks.quantized

Every way has the learning rate that was chosen for LoRA on floats (results/tune_digits_vit.json), the same
layers, epochs, batches and seeds. Writes benchmarks/results/quantized.json.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from statistics import mean
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model

import lora_lightning as ll
from benchmarks import measure
from benchmarks.fits import quiet, trainer
from benchmarks.models import as_bitsandbytes_has_it
from benchmarks.tune_digits import EPOCHS, LORA, RESULTS, classifier, spread, test_accuracy
from lora_lightning.data.digits import DigitsDataModule
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.utils.tables import format_table

SEEDS = range(5)
WAYS = ("floats", "int8", "nf4", "peft_nf4")
LINEAR = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"


def main() -> None:
    quiet()
    warnings.filterwarnings("ignore", message="the adapter in .* was trained on weights")
    lr = json.loads((RESULTS / "tune_digits_vit.json").read_text())["chosen"]["lora"]["lr"]
    found = {way: {"lr": lr, **measured(way, lr)} for way in WAYS}
    rows = [
        (
            way,
            f"{row['weights_mb']:.2f}",
            f"{row['before']:.1f}",
            spread(row["test"]),
            spread(row["on_floats"]) if "on_floats" in row else "",
        )
        for way, row in found.items()
    ]
    print(format_table(("base", "weights MB", "before %", "LoRA %", "moved to floats %"), rows))
    for way in WAYS[1:]:
        pairs = zip(found[way]["test"], found["floats"]["test"], strict=True)
        print(f"{way}: {mean(a - b for a, b in pairs):+.1f} points beside floats, seed by seed")
    result = {"seeds": [*SEEDS], "epochs": EPOCHS, "torch": torch.__version__, "ways": found}
    (RESULTS / "quantized.json").write_text(json.dumps(result, indent=2) + "\n")


def measured(way: str, lr: float) -> dict[str, Any]:
    """MB of the adapted layers' weights, and test accuracies in percent: of the base, of LoRA with each seed,
    and of the same adapters on the base in floats."""
    base = based(way, lr)
    weights = [
        m.weight for n, m in base.model.named_modules() if n.startswith("blocks.") and hasattr(m, "bias")
    ]
    kept = sum(part.nbytes for w in weights if w.dim() == 2 for part in measure.parts(w)) / 1e6
    row: dict[str, Any] = {"weights_mb": kept, "before": test_accuracy(base), "test": []}
    for seed in SEEDS:
        L.seed_everything(seed, verbose=False)
        module = based(way, lr)
        callbacks = [] if way == "peft_nf4" else [ll.LoRACallback(verbose=False, **LORA)]
        if way == "peft_nf4":
            adapt_by_peft(module)
        fitter = trainer(callbacks=callbacks, max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS)
        fitter.fit(module, datamodule=DigitsDataModule("target", seed=seed))
        row["test"].append(test_accuracy(module))
        if way in ("int8", "nf4"):
            row.setdefault("on_floats", []).append(test_accuracy(on_floats(module, lr)))
        print(way, seed, f"{row['test'][-1]:.1f}", flush=True)
    return row


def based(way: str, lr: float) -> ImageClassifier:
    """The classifier before training, its linear layers as this way keeps them."""
    module = classifier("vit", lr)
    if way in ("int8", "nf4"):
        ll.quantize(module, way)
    if way == "peft_nf4":
        as_bitsandbytes_has_it(module.model, LINEAR)
    return module


def adapt_by_peft(module: ImageClassifier) -> None:
    """The layers that `LORA` adapts, at the same scaling; the head trains."""
    module.model = get_peft_model(
        module.model,
        LoraConfig(
            r=LORA["rank"],
            lora_alpha=2 * LORA["rank"],
            target_modules=rf"{LINEAR}|patch_embed\.proj",
            modules_to_save=["head"],
        ),
    )


def on_floats(module: ImageClassifier, lr: float) -> ImageClassifier:
    """A new classifier in floats with the adapter of one that was trained on rounded weights."""
    moved = classifier("vit", lr)
    with tempfile.TemporaryDirectory() as folder:
        ll.save_adapter(module, folder)
        ll.load_adapter(moved, folder)
    return moved


if __name__ == "__main__":
    main()
