"""What `python train.py` and `lora-lightning train` do once the command line is sound: one job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from lora_lightning.adapters import quantize as quantization
from lora_lightning.app.adapters import config_of, names_of
from lora_lightning.app.check import LAST, last_checkpoint
from lora_lightning.app.console import on_rank_zero, say, short_path
from lora_lightning.app.interrupts import wait_no_more
from lora_lightning.app.job import Job, main_method
from lora_lightning.app.loggers import (
    build_loggers,
    chosen_in_words,
    finish,
    log_start,
    log_table,
    where,
)
from lora_lightning.app.results import Result, results_rows, results_table, save_results, save_together
from lora_lightning.app.resume import (
    continue_logs,
    forget_end,
    is_finished,
    put_metrics_aside,
    refuse_finished,
)
from lora_lightning.app.sweep import Ended
from lora_lightning.files.format import read_adapter
from lora_lightning.files.locate import FACTS_FILE
from lora_lightning.files.random_base import BASE_FILE
from lora_lightning.files.save_load import load_adapter, save_adapter
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.tables import percent

FILES = {
    "adapter": "the adapter: lora_lightning.load_adapter(model, FOLDER)",
    "base.safetensors": "the random weights that the adapter is added to",
    "model.safetensors": "the trained weights: model.checkpoint=FILE",
    "checkpoints/best.ckpt": "the epoch that was tested",
    "checkpoints/last.ckpt": "the last one: go on with resume=FOLDER trainer.max_epochs=MORE",
    "csv/metrics.csv": "every metric",
    "tensorboard": "tensorboard --logdir FOLDER",
    "wandb": "the W&B run",
    "fit-profile.txt": "seconds of each step of the loop",
    "contact_sheet.png": "what was found in the first test images, before and after",
    "report.html": "examples from the test data, before and after, and the worst mistakes",
    "results.json": "the table above",
    "config.yaml": "the whole configuration",
}
RANDOM_BASE = """WARNING: LoRA is added to random weights, in whole or in part, and they do not train.
  Give model.pretrained=true or model.checkpoint=FILE.safetensors; lora=none trains everything from scratch.
  The adapter works on these weights alone, which are kept in {}."""


def run(config: DictConfig, tell: Callable[[Ended], None]) -> float | None:
    """Train what is configured: one model, or each of several adapters and then all in one model.

    Args:
        tell: is told what each has ended in, as soon as it has.

    Returns:
        The best validation score, of several adapters the mean.
    """
    names = names_of(config)
    if not names:
        return train_one(config, tell)[0]
    folder = Path(config.run_dir)
    if config.ckpt_path == LAST:
        refuse_finished(config, folder)
    _begin(config, folder)
    done = {name: _train_adapter(config, name, tell) for name in names}
    if on_rank_zero():
        for line in _together(config, {name: job for name, (_, job) in done.items()}, folder):
            print(line)
        save_together(folder, names)
    best = [score for score, _ in done.values() if score is not None]
    return sum(best) / len(best) if best else None


def _train_adapter(config: DictConfig, name: str, tell: Callable[[Ended], None]) -> tuple[float | None, Job]:
    """One of several adapters; with resume=FOLDER one that is done is left as it is."""
    one = config_of(config, name)
    folder = Path(one.run_dir)
    if config.ckpt_path == LAST and is_finished(one, folder):
        say(f"\nadapter {name}: is done, in {short_path(folder)}")
        return None, Job(one, "before", folder)
    return train_one(one, tell, name)


def _together(config: DictConfig, jobs: dict[str, Job], folder: Path) -> list[str]:
    """All adapters in one model, and what the task has to say of it."""
    first = next(iter(jobs))
    task = Job(config_of(config, first), "before", folder).task
    if not hasattr(task, "report_together"):
        return []
    quantization.quantize_as(task, read_adapter(folder / first / "adapter").quantized)
    for name, job in jobs.items():
        load_adapter(task, folder / name / "adapter", adapter=name)
        job.data.setup()
    return task.report_together({name: job.data for name, job in jobs.items()}, folder)


def train_one(
    config: DictConfig, tell: Callable[[Ended], None], adapter: str = ""
) -> tuple[float | None, Job]:
    """Train, test, compare and save one model, and print what was done.

    Returns:
        The best validation score, and the job, whose task holds what was tested.
    """
    folder = Path(config.run_dir)
    goes_on = config.ckpt_path == LAST
    if goes_on:
        refuse_finished(config, folder)
        config.ckpt_path = last_checkpoint(folder, config.trainer.max_epochs)
        if on_rank_zero():
            continue_logs(config, folder)
    say(_title(config, folder, adapter))
    plain = _begin(config, folder)
    if config.threads:
        torch.set_num_threads(config.threads)
    method = main_method(config)
    job = Job(config, method, folder)
    _write_config(dict(getattr(job.data, "provides", {})), folder / FACTS_FILE)
    lines = [str(job.plan or _full_plan(job)), quantization.summary(job.task)]
    say("\n" + "\n".join(filter(None, lines)) + "\n")
    if job.random_base:
        say(f"{RANDOM_BASE.format(short_path(folder / BASE_FILE))}\n")
    loggers = build_loggers(config)
    status = "failed"
    try:
        log_start(loggers, plain, job.trained, job.total, job.plan)
        for line in filter(None, [chosen_in_words(config), *where(loggers)]):
            say(f"{line}\n")
        results = [job.run(loggers, config.ckpt_path)]
        _save_weights(job, folder)
        if config.compare:
            others = {name: _peer(config, name, goes_on) for name in ("before", "probe", "full")}
            results = [others["before"], others["probe"], *results, others["full"]]
        scores = job.task.scores
        log_table(loggers, "results", *results_rows(results, scores))
        status = "success"
    finally:
        wait_no_more()
        finish(loggers, status)
    _report(results, job, folder)
    result = next(r for r in results if r.method == method)
    context = HydraConfig.get()
    if not adapter or context.mode == RunMode.MULTIRUN:
        words = [*context.overrides.task, *([adapter] if adapter else [])]
        tell(Ended(words, result, job.task.scores))
    return result.best_validation, job


def _peer(config: DictConfig, method: str, goes_on: bool) -> Result:
    """The result of a method that the run's own is compared with; it goes on where the run does."""
    folder = Path(config.run_dir) / method
    checkpoint = None
    if goes_on and (checkpoint := last_checkpoint(folder, config.trainer.max_epochs)) and on_rank_zero():
        put_metrics_aside(folder)
    return Job(config, method, folder).run(ckpt_path=checkpoint)


def _begin(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Write what is about to run, where nothing says any more that it is done; returns it as plain values."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    if on_rank_zero():
        forget_end(folder)
    _write_config(plain, folder / "config.yaml")
    return plain


def _title(config: DictConfig, folder: Path, adapter: str) -> str:
    context = HydraConfig.get()
    words = [f"recipe {context.runtime.choices.get('recipe')}", f"seed {config.seed}"]
    if adapter:
        words[0] = f"\n{words[0]} · adapter {adapter}"
    if context.mode == RunMode.MULTIRUN:
        words.insert(0, f"job {context.job.num}: {' '.join(context.overrides.task)}")
    if config.ckpt_path:
        words.append(f"resumed from {config.ckpt_path}")
    return f"{' · '.join(words)} · {short_path(folder)}"


def _full_plan(job: Job) -> str:
    return f"trainable: {job.trained:,} of {job.total:,} parameters ({percent(job.trained, job.total)})"


@rank_zero_only
def _write_config(plain: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(plain), path)  # type: ignore[call-overload]


@rank_zero_only
def _save_weights(job: Job, folder: Path) -> None:
    """The adapter, or the whole model where everything was trained."""
    if job.method == "lora":
        save_adapter(job.task, folder / "adapter")
    else:
        tensors = {n: t.contiguous().cpu() for n, t in job.task.model.state_dict().items()}
        path = folder / "model.safetensors"
        write_whole(path, lambda file: save_file(tensors, file, {"format": "pt"}))


@rank_zero_only
def _report(results: list[Result], job: Job, folder: Path) -> None:
    """The table, what the task itself has to say, and what lies in the folder."""
    print(f"\n{results_table(results, job.task.scores)}\n")
    if hasattr(job.task, "report"):
        for line in job.task.report(job.data, folder):
            print(line)
    save_results(results, folder / "results.json")  # last: it says that the run is finished
    print(f"In {short_path(folder)}:")
    width = max(map(len, FILES))
    for name, meaning in FILES.items():
        if (folder / name).exists():
            print(f"  {name:<{width}}  {meaning}")
