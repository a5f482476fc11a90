"""What `python train.py` and `lora-lightning train` do once the command line is sound: one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lora_lightning.adapters import quantize as quantization
from lora_lightning.app.adapters import config_of, names_of
from lora_lightning.app.build import compared_config
from lora_lightning.app.check import LAST, last_checkpoint
from lora_lightning.app.console import say, short_path
from lora_lightning.app.export_options import is_wanted
from lora_lightning.app.interrupts import wait_no_more
from lora_lightning.app.left import Facts, save_updates
from lora_lightning.app.logged import log_end, log_method
from lora_lightning.app.loggers import (
    Loggers,
    build_loggers,
    chosen_in_words,
    finish,
    give_ids,
    keep_ids,
    log_start,
    loggers_beside,
    where,
)
from lora_lightning.app.methods import ADAPTING, compared
from lora_lightning.app.prepare import in_words, save_trained
from lora_lightning.app.results import Result, results_table, save_results, save_together
from lora_lightning.app.resume import (
    forget_end,
    is_finished,
    put_metrics_aside,
    refuse_finished,
)
from lora_lightning.app.run import Run
from lora_lightning.app.run_names import RunName, run_name
from lora_lightning.app.search import search
from lora_lightning.app.sweep import Ended
from lora_lightning.app.travels import origin_of
from lora_lightning.app.tune import tuned
from lora_lightning.errors import UserError
from lora_lightning.files.locate import FACTS_FILE, read_any
from lora_lightning.files.random_base import BASE_FILE
from lora_lightning.files.save_load import load_adapter
from lora_lightning.report import run as page
from lora_lightning.utils.ranks import on_rank_zero

FILES = {
    "adapter": "the adapter: lora-lightning predict or evaluate adapter=FOLDER; load_adapter(model, FOLDER)",
    "base.safetensors": "the random weights that the adapter is added to",
    "model.safetensors": "the trained weights: model.checkpoint=FILE",
    "checkpoints/best.ckpt": "the epoch that was tested",
    "checkpoints/last.ckpt": "the last one: go on with resume=FOLDER trainer.max_epochs=MORE",
    "csv/metrics.csv": "every metric",
    "tensorboard": "tensorboard --logdir FOLDER",
    "wandb": "the W&B run",
    "fit-profile.txt": "seconds of each step of the loop",
    "contact_sheet.png": "what was found in the first test images, before and after",
    "report.html": "the page of the run: scores, curves, layers, and test data before and after",
    "per_class.csv": "precision, recall and F1 of each class, before and after",
    "exported": "the file and its card: python run.py there",
    "results.json": "the table above",
    "tuning.json": "what tuning tried",
    "config.yaml": "the whole configuration",
}
RANDOM_BASE = """WARNING: {label} is added to random weights, in whole or in part, and they do not train.
  Give model.pretrained=true or model.checkpoint=FILE.safetensors; method=full trains everything from scratch.
  The adapter works on these weights alone, which are kept in {path}."""
RANDOM_START = """WARNING: the model begins with random weights, in whole or in part.
  If that is not meant, give model.pretrained=true or model.checkpoint=FILE.safetensors."""


def train(config: DictConfig, tell: Callable[[Ended], None]) -> float | None:
    """Train what is configured: one model, or each of several adapters and then all in one model.

    Args:
        tell: is told what each has ended in, as soon as it has.

    Returns:
        The best validation score, of several adapters the mean.
    """
    if config.search:
        return _search(config)
    names = names_of(config)
    if not names:
        return train_one(config, tell)[0]
    folder = Path(config.run_dir)
    if config.ckpt_path == LAST:
        refuse_finished(config, folder)
    _begin(config, folder)
    facts = Facts.begin(config, folder, goes_on=config.ckpt_path == LAST) if on_rank_zero() else None
    done = {name: _train_adapter(config, name, tell) for name in names}
    if facts:
        for line in _together(config, {name: run for name, (_, run) in done.items()}, folder):
            print(line)
        save_together(folder, names)
        facts.ended()
        print(f"{short_path(page.write(folder))}: the page of these adapters")
    best = [score for score, _ in done.values() if score is not None]
    return sum(best) / len(best) if best else None


def _search(config: DictConfig) -> float | None:
    say(_title(config, Path(config.run_dir), ""))
    if config.threads:
        torch.set_num_threads(config.threads)
    return search(config)


def _train_adapter(config: DictConfig, name: str, tell: Callable[[Ended], None]) -> tuple[float | None, Run]:
    """One of several adapters; with resume=FOLDER one that is done is left as it is."""
    one = config_of(config, name)
    folder = Path(one.run_dir)
    if config.ckpt_path == LAST and is_finished(one, folder):
        say(f"\nadapter {name}: is done, in {short_path(folder)}")
        return None, Run(_untrained(one), folder)
    return train_one(one, tell, name)


def _together(config: DictConfig, runs: dict[str, Run], folder: Path) -> list[str]:
    """All adapters in one model, and what the task has to say of it."""
    if any(config_of(config, name).method not in ADAPTING for name in runs):
        return []
    first = next(iter(runs))
    task = Run(_untrained(config_of(config, first)), folder, keeps=False).task
    if not hasattr(task, "report_together"):
        return []
    quantization.quantize_as(task, read_any(folder / first / "adapter").quantized)
    for name, run in runs.items():
        load_adapter(task, folder / name / "adapter", adapter=name)
        run.data.setup()
    tested = {name: run.task.heard for name, run in runs.items() if run.is_exact()}
    return task.report_together({name: run.data for name, run in runs.items()}, folder, tested)


def _untrained(config: DictConfig) -> DictConfig:
    """The same without a method, to build what it trains."""
    bare = config.copy()
    bare.method, bare.compare = "none", []
    return bare


def train_one(
    config: DictConfig, tell: Callable[[Ended], None], adapter: str = ""
) -> tuple[float | None, Run]:
    """Train, test, compare and save one model, and print what was done.

    Returns:
        The best validation score, and the run, whose task holds what was tested.
    """
    folder = Path(config.run_dir)
    goes_on = _go_on(config, folder)
    say(_title(config, folder, adapter))
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.tune:
        _begin(config, folder)
        config = tuned(config, folder, goes_on)
    plain = _begin(config, folder)
    facts = Facts.begin(config, folder, adapter, goes_on) if on_rank_zero() else None
    run = Run(config, folder)
    if facts:
        facts.planned(run.prepared.plan, run.prepared.trained, run.prepared.total)
    _say_plan(run, folder)
    results = _compare(config, run, plain, goes_on, run_name(config, adapter))
    failed = _export(config, run, results, folder) if facts else None
    if facts:
        _report(results, run, folder, facts)
    if failed:
        raise UserError(
            f"{failed}\nThe run itself is whole, in {short_path(folder)}: give export.format=null."
        )
    result = next(r for r in results if r.method == run.method)
    context = HydraConfig.get()
    if not adapter or context.mode == RunMode.MULTIRUN:
        words = [*context.overrides.task, *([adapter] if adapter else [])]
        tell(Ended(words, result, run.task.scores))
    return result.best_validation, run


def _go_on(config: DictConfig, folder: Path) -> bool:
    """Whether a run goes on in its folder; then from its last checkpoint, if there is one already."""
    if config.ckpt_path != LAST:
        return False
    refuse_finished(config, folder)
    config.ckpt_path = last_checkpoint(folder, config.trainer.max_epochs)
    give_ids(config, folder)
    if on_rank_zero():
        put_metrics_aside(folder)
    return True


def _say_plan(run: Run, folder: Path) -> None:
    """What trains, and on which weights; what the data say of themselves is kept beside the adapter."""
    _write_config(dict(getattr(run.data, "provides", {})), folder / FACTS_FILE)
    told = [f"{run.prepared.compressed}\n"] if run.prepared.compressed else []
    lines = [*told, in_words(run.method, run.label, run.prepared), quantization.summary(run.task)]
    say("\n" + "\n".join(filter(None, lines)) + "\n")
    if run.random_base:
        say(f"{RANDOM_BASE.format(label=run.label, path=short_path(folder / BASE_FILE))}\n")
    elif run.on_random:
        say(f"{RANDOM_START}\n")


def _compare(
    config: DictConfig, run: Run, plain: dict[str, Any], goes_on: bool, name: RunName
) -> list[Result]:
    """The result of the run, and of the methods of compare, as every logger is told."""
    loggers = build_loggers(config, name)
    status = "failed"
    try:
        log_start(loggers, plain, run.prepared)
        keep_ids(loggers, Path(config.run_dir))
        for line in filter(None, [chosen_in_words(config), *where(loggers.all())]):
            say(f"{line}\n")
        order = compared(run.method, config.compare)
        ended = {run.method: run.train_and_test(loggers.all(), config.ckpt_path)}
        _save_weights(run, plain, Path(config.run_dir))
        for method in (run.method, *(m for m in order if m != run.method)):
            if method not in ended:
                ended[method] = _compared(config, method, goes_on, name, loggers)
            if len(order) > 1:
                say(ended[method].line(run.task.scores))
        results = [ended[method] for method in order]
        log_end(loggers, run, results)
        status = "success"
        return results
    finally:
        wait_no_more()
        finish(loggers, status)


def _export(config: DictConfig, run: Run, results: list[Result], folder: Path) -> UserError | None:
    """Add the exported file to the results, where that is wanted; or return why it cannot be, which is told
    when all else has been."""
    if not is_wanted(config):
        return None
    from lora_lightning.app.export_run import exported_result

    try:
        told, result = exported_result(config, results, run.task.scores, folder)
    except UserError as error:
        return error
    print(f"\n{told}")
    results.append(result)
    return None


def _compared(config: DictConfig, method: str, goes_on: bool, name: RunName, loggers: Loggers) -> Result:
    """The result of a method that the run's own is compared with; it goes on where the run does.

    Args:
        name, loggers: of the run, whose trackers show the method's curves beside the run's.
    """
    folder = Path(config.run_dir) / method
    one = compared_config(config, method, folder)
    if method == "none":
        return Run(one, folder, keeps=False).train_and_test([])
    checkpoint = None
    for key, node in (one.get("logger") or {}).items():  # those given are the run's own
        if isinstance(node, DictConfig) and "id" in node:
            one.logger[key].id = None
    if goes_on:
        give_ids(one, folder)
        checkpoint = last_checkpoint(folder, config.trainer.max_epochs)
        if checkpoint and on_rank_zero():
            put_metrics_aside(folder)
    plain: Any = OmegaConf.to_container(one, resolve=True)
    run = Run(one, folder, keeps=False)
    beside, status = loggers_beside(one, name, loggers), "failed"
    try:
        log_start(beside, plain, run.prepared)
        keep_ids(beside, folder)
        result = run.train_and_test(beside.all(), checkpoint)
        log_method(beside, result, run.task.scores)
        status = "success"
        return result
    finally:
        finish(beside, status)


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


@rank_zero_only
def _write_config(plain: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(plain), path)


@rank_zero_only
def _save_weights(run: Run, plain: dict[str, Any], folder: Path) -> None:
    """What was trained, and with it what it comes from."""
    origin = origin_of(str(HydraConfig.get().runtime.choices.get("recipe")), plain, run.data, run.task)
    _write_config(origin.facts, folder / FACTS_FILE)
    save_trained(run.task, run.method, run.prepared, folder, origin)


def _report(results: list[Result], run: Run, folder: Path, facts: Facts) -> None:
    """The table, what the task itself has to say, the page of the run, and what lies in the folder."""
    print(f"\n{results_table(results, run.task.scores)}\n")
    if hasattr(run.task, "report"):
        for line in run.task.report(run.data, folder):
            print(line)
    facts.planned(run.prepared.plan, run.prepared.trained, run.prepared.total)  # which data may have decided
    facts.end(results, run.task, run.device)
    save_updates(run.task, run.prepared.before, folder)
    save_results(results, folder / "results.json")  # last: it says that the run is finished
    page.write(folder)
    print(f"In {short_path(folder)}:")
    width = max(map(len, FILES))
    for name, meaning in FILES.items():
        if (folder / name).exists():
            print(f"  {name:<{width}}  {meaning}")
