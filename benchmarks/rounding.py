"""How W' = W + s·B·A is to be rounded in bfloat16 so that LoRA trains as in float32.

python -m benchmarks.rounding --task digits        trains, and goes on where it was stopped
python -m benchmarks.rounding --task accents
python -m benchmarks.rounding                      the tables and the picture of what is there

Ways: "branch", x·Wᵀ + (x·Aᵀ)·(s·B)ᵀ as adapted layers compute it in bfloat16; and W' rounded once from
float32: "nearest", "stochastic" (fresh noise at each use) and "dither" (noise drawn once). In "exact" W'
stays float32: what is lost there is lost by activations and gradients in bfloat16. All are compared with
"float32", a seed and a step at a time; "nudged" is the same with A changed by a part in 10^6: how far two
float32 trainings drift apart.

bf16-true: W, biases and activations are bfloat16; float32's W has the same values. bf16-mixed: W is float32,
under autocast. Below the recipe's rate the updates alone train.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.fits import quiet
from benchmarks.rounding_forms import HALF, ROUNDINGS, Rounder, rounded_by, units
from benchmarks.rounding_report import draw, summary, survival_table, table
from benchmarks.rounding_survival import survival
from benchmarks.rounding_tasks import TASKS, Task, adapted
from lora_lightning.layers.registry import lora_layers
from lora_lightning.tasks.optim_config import ScheduleConfig
from lora_lightning.tasks.schedules import schedule_of
from lora_lightning.utils.progress import working

RESULTS = Path(__file__).parent / "results" / "rounding.json"
WAYS = {
    "bf16-true": ("float32", "nudged", "exact", "branch", "nearest", "stochastic", "dither"),
    "bf16-mixed": ("float32", "branch", "nearest"),
}
# fractions of the recipe's rate: with a hundredth the updates end at half a unit of W's last place
FACTORS = {
    ("digits", "bf16-true"): (1.0, 0.1, 0.01, 0.001),
    ("digits", "bf16-mixed"): (1.0, 0.01),
    ("accents", "bf16-true"): (1.0, 0.1, 0.01),
    ("accents", "bf16-mixed"): (1.0, 0.01),
}
STEPS = {"digits": 60, "accents": 30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="a training; the default is the task's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    quiet()
    if given.task:
        train_all(given.task, given.seeds, given.steps or STEPS[given.task], given.out)
    runs, survived = read(given.out), survival()
    write(given.out, runs, survival=survived, summary=summary(runs))
    draw(runs, given.out.with_suffix(".png"))
    print(survival_table(survived) + "\n\n" + table(runs))


def train_all(name: str, seeds: int, steps: int, out: Path) -> None:
    """Every way that is not in the file yet, seed by seed."""
    task = TASKS[name]()
    for seed in range(seeds):
        for key in working(list(settings(name, seed)), f"seed {seed}", "runs"):
            if not any(key.items() <= run.items() for run in read(out)):
                run = key | train(task, key["precision"], key["way"], key["factor"], seed, steps)
                write(out, [*read(out), run])
                print({k: v for k, v in run.items() if k != "losses"}, flush=True)


def settings(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """What tells a training from the others; "before" is none, the pretrained model in bfloat16."""
    for precision, ways in WAYS.items():
        if seed == 0:
            yield {"task": name, "precision": precision, "factor": 1.0, "way": "before", "seed": 0}
        for factor in FACTORS[name, precision]:
            for way in ways:
                if way != "nudged" or factor == 1:
                    yield {"task": name, "precision": precision, "factor": factor, "way": way, "seed": seed}


def train(task: Task, precision: str, way: str, factor: float, seed: int, steps: int) -> dict[str, Any]:
    """Losses of the steps; validation loss and score by this way, and in float32 with what it has learned;
    the size of the updates in the end."""
    base = HALF if precision == "bf16-true" else torch.float32
    dtype = torch.float32 if way in ("float32", "nudged") else base
    heads = factor == 1
    module = adapted(task, base, dtype, seed, heads)
    if way == "nudged":
        nudge(module)
    mixed = dtype is torch.float32 and way not in ("float32", "nudged")
    with rounded_by(Rounder(way, seed)) if way in ROUNDINGS else nullcontext():
        losses = train_steps(task, module, factor, seed, 0 if way == "before" else steps, mixed)
        with torch.no_grad(), torch.autocast("cpu", HALF, enabled=mixed):
            validation = task.evaluate(module.eval())
    learned = validation
    if dtype is not torch.float32 or mixed:
        float32 = adapted(task, base, torch.float32, seed, heads)
        float32.load_state_dict(module.state_dict())
        with torch.no_grad():
            learned = task.evaluate(float32.eval())
    return {"losses": losses, "validation": validation, "learned": learned, "size": size(module)}


@torch.no_grad()
def size(module: Any) -> float:
    """The median of |s·B·A| in units of W's last place, over all entries of all updates."""
    found = []
    for layer in lora_layers(module).values():
        W, (update,) = layer.parts("weight")
        found.append((update.product(W).abs() / units(W)).flatten())
    return torch.cat(found).median().item()


def train_steps(task: Task, module: Any, factor: float, seed: int, steps: int, autocast: bool) -> list[float]:
    """By the recipe's AdamW with warm-up and cosine decay; the loss of each step."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.lr, weight_decay=0.0)
    rate, losses = schedule_of(ScheduleConfig(), steps), []
    module.train()
    for step, batch in enumerate(islice(task.batches(seed), steps)):
        with torch.autocast("cpu", HALF, enabled=autocast):
            loss = task.loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        if task.clip:
            torch.nn.utils.clip_grad_norm_(trained, task.clip)
        for group in optimizer.param_groups:
            group["lr"] = factor * task.lr * rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def nudge(module: Any) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("lora_A"):
            parameter.mul_(1 + 1e-6)


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"] if path.exists() else []


def write(path: Path, runs: list[dict[str, Any]], **more: Any) -> None:
    """A run a line."""
    about = {"torch": torch.__version__, "steps": STEPS, "lr": {n: t.lr for n, t in TASKS.items()}}
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()]
    for name, rows in (more | {"runs": runs}).items():
        lines = ",\n".join(json.dumps(_short(row), ensure_ascii=False) for row in rows)
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    path.write_text("{" + ",\n".join(parts) + "}\n")


def _short(value: Any) -> Any:
    """Numbers to six digits."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
