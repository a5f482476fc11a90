"""Updates of other forms against LoRA on the digits models: each at its own tuned rate.

python -m benchmarks.other_forms                 # goes on where it was stopped
python -m benchmarks.other_forms --table         # trains nothing

From the source domain to the target one, 300 training images, as the recipes have them, but shorter. The
rate of a form is searched with one seed: three powers of 4, then the powers of 2 on both sides of the best,
and beyond where the best is the last. The better two are trained with two more seeds, and the one with the
higher mean validation accuracy with five in all: these are the rows of the table. The head trains in full, at
one rate for all forms, and the statistics of BatchNorm stay.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.fits import quiet
from benchmarks.forms import FORMS, RANK, VERA_RANK
from benchmarks.real_pictures import markdown
from benchmarks.tune_digits import CLASSES, MODELS, spread
from lora_lightning import LoRAConfig, plan
from lora_lightning.data.digits import DigitsDataModule, load_scans, render, split_indices
from lora_lightning.models.timm import timm_model
from lora_lightning.planning.heads import find_heads
from lora_lightning.utils.names import submodule

RESULTS = Path(__file__).parent / "results"
EPOCHS, BATCH, TRAIN = 10, 32, 300
SEEDS = (0, 1, 2, 3, 4)
TUNED = SEEDS[:3]
HEAD_RATE = {"vit": 4e-3, "resnet": 8e-3}  # LoRA's, by benchmarks/tune_digits.py
WARMUP = 0.1
T_95 = 2.776  # Student's t of four degrees of freedom
UNIT = 1e-3  # rates are UNIT · 2 ** n
# Where the search by powers of 4 begins: n of its middle.
MIDDLE = {
    "lora": 2, "hira": 5, "dora": 2, "dora_3": 2, "vera": 6, "lora_1": 4, "randlora": 4, "loha": 4, "lokr": 2,
    "tucker": 2, "ssvd": 3, "full": 0,
}  # fmt: skip
LABELS = {
    "lora": "LoRA, r = 4", "hira": "HiRA, r = 4", "dora": "DoRA, r = 4", "dora_3": "DoRA, r = 3",
    "vera": "VeRA, r = 256", "lora_1": "LoRA, r = 1", "randlora": "RandLoRA", "loha": "LoHa, r = 2",
    "lokr": "LoKr", "tucker": "LoRA with a Tucker core", "ssvd": "SSVD", "full": "full fine-tuning",
}  # fmt: skip
ONLY = {"tucker": ("resnet",)}  # without kernels of several positions it is LoRA


class Runs:
    """Finished runs by model, form, n of the rate and seed, each a line of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {self.key(found): found for found in map(json.loads, lines)}

    @staticmethod
    def key(found: dict[str, Any]) -> tuple[str, str, int, int]:
        return found["model"], found["form"], found["n"], found["seed"]

    def score(self, model: str, form: str, n: int, seeds: tuple[int, ...]) -> float:
        """Mean validation accuracy; what is missing is trained now."""
        return mean(self.run(model, form, n, seed)["val"] for seed in seeds)

    def run(self, model: str, form: str, n: int, seed: int) -> dict[str, Any]:
        key = (model, form, n, seed)
        if key not in self.done:
            self.done[key] = train(*key)
            with self.path.open("a") as file:
                file.write(json.dumps(self.done[key]) + "\n")
            print(json.dumps(self.done[key]), flush=True)
        return self.done[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--model", choices=sorted(MODELS), help="this one alone")
    options = parser.parse_args()
    quiet()
    runs = Runs(RESULTS / "other_forms.jsonl")
    models = [options.model] if options.model else [*MODELS]
    for form, model in () if options.table else product(FORMS, models):
        if model in ONLY.get(form, MODELS):
            runs.score(model, form, tune(runs, model, form), SEEDS)
            write(runs)
    write(runs)


def tune(runs: Runs, model: str, form: str) -> int:
    """n of the best rate."""
    tried: dict[int, float] = {}
    middle = MIDDLE[form]
    for step, grid in ((2, (middle - 2, middle, middle + 2)), (1, ())):
        best = max(tried, key=tried.__getitem__, default=middle)
        wanted = [*grid] or [best - 1, best + 1]
        while wanted:
            tried |= {n: runs.score(model, form, n, TUNED[:1]) for n in wanted}
            best = max(tried, key=lambda n: (tried[n], -n))
            wanted = [n for n in (best - step, best + step) if not min(tried) <= n <= max(tried)]
    finalists = sorted(tried, key=lambda n: (tried[n], -n))[-2:]
    return max(finalists, key=lambda n: (runs.score(model, form, n, TUNED), -n))


def train(name: str, form: str, n: int, seed: int) -> dict[str, Any]:
    """One run. Accuracies in percent, CPU seconds of the training alone."""
    torch.manual_seed(seed)
    model = timm_model(**MODELS[name], num_classes=CLASSES).to(memory_format=torch.channels_last)
    updates = adapted(model, form)
    head = [p for h in find_heads(model) for p in submodule(model, h).parameters()]
    moved = [p for update in updates for p in update.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in head + moved:
        parameter.requires_grad_(True)
    groups = [{"params": moved, "lr": UNIT * 2**n}, {"params": head, "lr": HEAD_RATE[name]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    batches = list(pictures(seed))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(batches)))
    start = time.process_time()
    for images, labels in batches:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    scores = {part: accuracy(model, part) for part in ("val", "test", "source")}
    count = sum(p.numel() for p in moved)
    return {"model": name, "form": form, "n": n, "seed": seed, **scores, "trained": count, "seconds": seconds}


def adapted(model: nn.Module, form: str) -> list[nn.Module]:
    """Put an update of this form on every layer but the head."""
    updates = []
    for layer in plan(model, LoRAConfig(target_modules="all")).layers:
        module = submodule(model, layer.name)
        updates.append(FORMS[form](module.weight.detach()))
        register_parametrization(module, "weight", updates[-1])
    return updates


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    warm = round(WARMUP * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


@lru_cache
def pictures(seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """All training batches of a run: the same for every form and rate of a seed."""
    made = torch.Generator().manual_seed(seed)
    scans, labels = load_scans()
    chosen = split_indices()[0][:TRAIN]
    batches = []
    for _ in range(EPOCHS):
        for part in chosen[torch.randperm(TRAIN, generator=made)].split(BATCH):
            batches.append((prepared(render(scans[part], "target", made)), labels[part]))
    return tuple(batches)


@lru_cache
def fixed(part: str) -> tuple[tuple[Tensor, Tensor], ...]:
    data = DigitsDataModule("target")
    data.setup()
    loaders = {"val": data.val_dataloader, "test": data.test_dataloader, "source": data.source_dataloader}
    return tuple((prepared(images), labels) for images, labels in loaders[part]())


def prepared(images: Tensor) -> Tensor:
    """As convolutions are fastest here."""
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: nn.Module, part: str) -> float:
    model.eval()
    batches = fixed(part)
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)
    return round(100 * right / sum(len(labels) for _, labels in batches), 2)


def write(runs: Runs) -> None:
    """The tables as markdown, and everything as JSON."""
    about = {
        "models": MODELS, "epochs": EPOCHS, "seeds": SEEDS, "head_rate": HEAD_RATE, "rank": RANK,
        "vera_rank": VERA_RANK, "torch": torch.__version__,
    }  # fmt: skip
    chosen = {model: tested(runs, model) for model in MODELS}
    found = about | {"chosen": chosen, "runs": list(runs.done.values())}
    (RESULTS / "other_forms.json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(line for model in MODELS for line in table(model, chosen[model]))
    (RESULTS / "other_forms.md").write_text(text + "\n")
    print(text)


def tested(runs: Runs, model: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of the rate that was chosen, by form; those that are not finished are left out."""
    by_rate: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for (name, form, n, _), found in sorted(runs.done.items()):
        if name == model:
            by_rate.setdefault((form, n), []).append(found)
    complete = {form: each for (form, _), each in by_rate.items() if len(each) == len(SEEDS)}
    return {form: complete[form] for form in FORMS if form in complete}


def table(model: str, chosen: dict[str, list[dict[str, Any]]]) -> list[str]:
    rows = []
    for form, found in chosen.items():
        rate, trained = UNIT * 2 ** found[0]["n"], f"{found[0]['trained']:,}"
        parts = [[run[part] for run in found] for part in ("val", "test", "source")]
        apart = difference([run["test"] for run in chosen.get("lora", found)], parts[1])
        rows.append(
            (LABELS[form], trained, f"{rate:g}", *map(spread, parts), "" if form == "lora" else apart)
        )
    head = ("", "trained but the head", "rate", "validation %", "test %", "source test %", "test - LoRA's")
    return [f"{model}, {EPOCHS} epochs, {len(SEEDS)} seeds:", "", markdown(head, rows), ""]


def difference(base: list[float], other: list[float]) -> str:
    """Mean and 95 % interval of the differences, seed by seed, by Student's t."""
    apart = [b - a for a, b in zip(base, other, strict=True)]
    return f"{mean(apart):+.1f} ± {T_95 * stdev(apart) / math.sqrt(len(apart)):.1f}"


if __name__ == "__main__":
    main()
