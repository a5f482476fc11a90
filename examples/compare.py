"""What the examples share: fit a LightningModule, and compare LoRA with full fine-tuning in one table."""

import copy
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lora_lightning as ll
from lora_lightning.utils.tables import format_table, percent

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(does not have many workers|logging interval|LeafSpec)")

Batch = tuple[Tensor, ...]


@dataclass
class Data:
    """Three batches: to train on, to choose rate and epoch by, and to report."""

    train: Batch
    validation: Batch
    test: Batch


class Best(pl.Callback):
    """The epoch with the best validation score (more is better), and the test score there."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.validation, self.test = -math.inf, math.nan

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.eval()
        score = module.score(self.data.validation)
        if score > self.validation:
            self.validation, self.test = score, module.score(self.data.test)
        module.train()


def fit(module: pl.LightningModule, data: Data, epochs: int, batch: int, *callbacks: pl.Callback) -> Best:
    """Train `module` on one CPU core."""
    best = Best(data)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, best],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module.train(), DataLoader(TensorDataset(*data.train), batch_size=batch, shuffle=True))
    return best


def compare(
    pretrained: pl.LightningModule,
    draw: Callable[[int], Data],
    lora: Callable[[], ll.LoRACallback],
    rates: dict[str, Sequence[float]],
    *,
    epochs: int,
    batch: int,
    seeds: int,
    score: str,
) -> str:
    """The table: before, LoRA, full fine-tuning; mean ± standard deviation over the seeds.

    A seed draws other training data and another order. Each method has learning rates of its own; its rate is
    the one with the best mean validation score, the epoch of each run the best on validation; the test
    data choose nothing.
    """
    with torch.no_grad():
        before = [pretrained.eval().score(draw(seed).test) for seed in range(seeds)]
    total = sum(p.numel() for p in pretrained.parameters())
    rows = [("before", "–", _mean_sd(before), "0", percent(0, total))]
    for method in ("LoRA", "full fine-tuning"):
        runs: dict[float, list[Best]] = {}
        for rate in rates[method]:
            for seed in range(seeds):
                pl.seed_everything(seed, verbose=False)
                module = copy.deepcopy(pretrained)
                module.rate = rate
                callbacks = [lora()] if method == "LoRA" else []
                runs.setdefault(rate, []).append(fit(module, draw(seed), epochs, batch, *callbacks))
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        rate = max(runs, key=lambda rate: statistics.mean(run.validation for run in runs[rate]))
        test = _mean_sd([run.test for run in runs[rate]])
        rows.append((method, f"{rate:g}", test, f"{trained:,}", percent(trained, total)))
    return format_table(("method", "rate", score, "trained", "share"), rows)


def _mean_sd(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
