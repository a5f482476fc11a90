"""Whisper trained by the application's commands, each a process of its own, as a user would type them."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.methods.catalog import Method
from benchmarks.methods.ledger import Found
from benchmarks.methods.suites import Task
from benchmarks.whisper_files import prepared
from lora_lightning.errors import UserError
from lora_lightning.utils.atomic import write_whole

WINDOW, BATCH = 10, 16.0  # seconds that are heard, and of a batch: about four utterances
TRIAL_TESTS = 4
WORDS = (
    "compare=[]", "logger=csv", f"model.seconds={WINDOW}", f"data.batch_seconds={BATCH:g}",
    "trainer=cpu", "trainer.enable_progress_bar=false", "data.num_workers=0", "threads=1",
)  # fmt: skip
ENTRY = "from lora_lightning.app.entry_point import main; main()"  # what `lora-lightning` is
REFUSED = 2  # the exit status of a mistake in what was typed


def train(task: Task, method: Method, stage: str, lr: float, seed: int) -> Found:
    """A trial, judged on the validation recordings; or a run and its tests. CPU seconds are those of the
    command `train`, its loading, validation and test too.

    Raises:
        UserError: a command has failed.
    """
    made = prepared()
    name = re.sub(r"[^\w.]+", "-", " ".join((task.label, method.label, stage, f"{lr:g}", str(seed))))
    run = made / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    told = command(made, "train", *words(task, method, stage, lr, seed, made), f"hydra.run.dir={run}")
    if told is not None:
        return {"refused": told}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    (result,) = json.loads((run / "results.json").read_text())
    found: Found = {
        "val": _validated(run) if method.method != "none" else None,
        "cpu_seconds": round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "trained": result["trained"],
        "rank": _rank(run, method),
        "stopped": "",
        "torch": torch.__version__,
    }
    if stage == "final":
        found |= tested(made, run, method, result)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return found


def words(task: Task, method: Method, stage: str, lr: float, seed: int, made: Path) -> list[str]:
    """Of the command `train`."""
    of_task = [word.replace("data.manifest=", f"data.manifest={made}/") for word in task.words]
    if stage == "tune":
        of_task = [_short_of_tests(word) if word.startswith("data.manifest=") else word for word in of_task]
    given = [*of_task, *WORDS, f"model.checkpoint={made / 'base'}", f"method={method.method}", f"seed={seed}"]
    if method.method != "none":
        given.append(f"optim.lr={lr}")
    return [*given, *(task.trial if stage == "tune" else ()), *method.words]


def tested(made: Path, run: Path, method: Method, result: dict[str, Any]) -> Found:
    """Scores on the held-out pool, and on English prompts with the adapter on; before, of the base."""
    base = (
        "recipe=whisper_manifest", f"model.checkpoint={made / 'base'}", f"model.seconds={WINDOW}",
        "data.test_share=1",
    )  # fmt: skip
    of = (f"adapter={run}", "data=manifest", "data.max_seconds=10") if method.method != "none" else base
    out = run / "english.json"
    english = (
        f"data.manifest={made / 'english.csv'}",
        "data.strict=false",
        "model.language=en",
        f"out={out}",
    )
    told = command(made, "evaluate", *of, *english)
    if told is not None:
        raise UserError(told)
    scores = json.loads(out.read_text())["scores"]
    return {
        "test": _percent(result["scores"]["wer"]),
        "test_cer": _percent(result["scores"]["cer"]),
        "source": _percent(scores["wer"]),
    }


def command(folder: Path, *given: str) -> str | None:
    """Run a command of the application's; what it refuses, None if it is done.

    Raises:
        UserError: it has failed otherwise.
    """
    entry = [sys.executable, "-c", ENTRY, *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(entry, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode == REFUSED:
        return done.stderr.strip()[-300:]
    if done.returncode:
        raise UserError(f"{' '.join(given)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return None


def _short_of_tests(word: str) -> str:
    """The manifest of a trial, which is not judged by tests: a few, since the run's page hears them all."""
    option, path = word.split("=", 1)
    manifest = Path(path)
    short = manifest.with_name(f"{manifest.stem}_trial.csv")
    if not short.exists():
        with manifest.open(encoding="utf8", newline="") as file:
            rows = list(csv.reader(file))
        split = rows[0].index("split")
        tests = [row for row in rows[1:] if row[split] == "test"][TRIAL_TESTS:]
        kept = [row for row in rows if row not in tests]
        write_whole(short, lambda to: _write_rows(kept, Path(to)))
    return f"{option}={short}"


def _write_rows(rows: list[list[str]], path: Path) -> None:
    with path.open("w", encoding="utf8", newline="") as file:
        csv.writer(file).writerows(rows)


def _validated(run: Path) -> float | None:
    """The best validation's score, in percent: that of the checkpoint that is tested."""
    lines = (run / "csv" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("val/wer")
    values = [cells[column] for cells in (line.split(",") for line in lines[1:]) if cells[column]]
    return _percent(min(map(float, values))) if values else None


def _rank(run: Path, method: Method) -> int | None:
    rank = yaml.safe_load((run / "config.yaml").read_text())["lora"]["rank"]
    return rank if method.method in ("lora", "peft") else None


def _percent(value: float) -> float:
    return round(100 * value, 3)
