"""One training of one method, as the application builds it, and what is measured of it."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from benchmarks.fits import trainer
from benchmarks.measure import saving
from benchmarks.methods.catalog import METHODS, REFERENCE, Method
from benchmarks.methods.ledger import Found
from benchmarks.methods.suites import Task
from lora_lightning import adapters_off
from lora_lightning.app.build import lora_config
from lora_lightning.app.check import problems_of
from lora_lightning.app.compose import UNCOMPOSABLE, shipped, without_hydra
from lora_lightning.app.peft_lora import PeftLoRA
from lora_lightning.app.prepare import Prepared
from lora_lightning.app.run import Run
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.planning.targets import plan

LARGEST = 256  # rank that is looked at for a method of the same size
OWN = ("ModelCheckpoint", "LearningRateMonitor", "Preemption")  # callbacks that have no work here


def train(task: Task, method: Method, stage: str, lr: float, seed: int) -> Found:
    """Train and validate after the last epoch; of a final run, test it too.

    Returns:
        Scores in percent, CPU seconds, parameters, bytes; or why the method is refused on this task.
    """
    try:
        run = built(task, method, lr, seed)
    except ConfigError as error:
        return {"refused": "; ".join(error.problems)}
    cost, stopped = Cost(), ""
    options = run.config.trainer
    fitter = trainer(
        callbacks=[*_own_callbacks(run), *run.prepared.callbacks(), cost],
        max_epochs=options.max_epochs,
        check_val_every_n_epoch=options.max_epochs,
        gradient_clip_val=options.gradient_clip_val,
    )
    start = time.process_time()
    try:
        if method.method != "none":
            fitter.fit(run.task, datamodule=run.data)
    except ConfigError as error:  # of what only the callback knows, such as data that it needs
        return {"refused": "; ".join(error.problems)}
    except UserError as error:  # the run collapsed
        stopped = str(error).splitlines()[0]
    seconds = time.process_time() - start
    found: Found = {
        "val": None if stopped else _percent(fitter.callback_metrics.get(f"val/{task.score}")),
        "cpu_seconds": round(seconds, 1),
        "trained": trained(run),
        "rank": _rank(run),
        "saved_bytes": cost.saved,
        "state_bytes": cost.state,
        "stopped": stopped,
        "torch": torch.__version__,
    }
    return found | (tested(task, run) if stage == "final" else {})


def built(task: Task, method: Method, lr: float, seed: int) -> Run:
    """The application's own run of a method on a task.

    Raises:
        ConfigError: it is refused.
    """
    words = [f"seed={seed}"]
    if method.method != "none":
        words.append(f"optim.lr={lr}")
    if method.match:
        words.append(f"lora.rank={same_size(task, method)}")
    config = configured(task, method, words)
    if not method.peft:
        return Run(config, config.run_dir, keeps=False)
    lora = lora_config(config)
    config.method = "none"
    run = Run(config, config.run_dir, keeps=False)
    try:
        peft = PeftLoRA(run.task, lora, **method.peft)
    except ValueError as error:  # of PEFT's own, such as an init that it has for linear layers alone
        raise ConfigError([f"PEFT: {error}"]) from None
    if method.peft.get("init_lora_weights") == "eva":
        _begin_by_data(peft.model, run.data, lora.data_batches)
    run.prepared = Prepared(peft.trained, peft.plan.total, peft.plan, peft=peft)
    return run


def _begin_by_data(model: Any, data: L.LightningDataModule, count: int) -> None:
    """PEFT's EVA with equal ranks, of so many of the fit's own batches."""
    from peft import EvaConfig, initialize_lora_eva_weights

    model.peft_config["default"].eva_config = EvaConfig(rho=1.0)
    data.prepare_data()
    data.setup("fit")
    data.trainer = trainer()
    data.trainer.training = True  # of which the transfer's hook asks
    batches = [data.on_after_batch_transfer(b, 0) for b in islice(data.train_dataloader(), count)]
    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda network, batch: network(batch[0]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda given, *_: given[0].flatten(0, -2),
        show_progress_bar=False,
    )


def configured(task: Task, method: Method, words: list[str]) -> DictConfig:
    """The configuration that the application would run.

    Raises:
        ConfigError: it would refuse it.
    """
    given = [*task.words, f"method={method.method}", "compare=[]", "logger=none", *method.words, *words]
    try:
        composed = shipped().compose(given)
    except UNCOMPOSABLE as error:
        raise ConfigError([" ".join(str(error).split())[:300]]) from None
    config = without_hydra(composed, str(Path(tempfile.gettempdir()) / "benchmarks_methods"))
    with open_dict(config):
        for section, values in task.changes.items():
            config[section] = OmegaConf.create(dict(values))
    if problems := problems_of(config):
        raise ConfigError(problems)
    return config


def centre(task: Task, method: Method) -> float:
    """Where a method's rates begin."""
    if method.method == "none":
        return 0.0
    known = task.centres.get(method.method)
    return method.rate * (known or configured(task, METHODS[REFERENCE], []).rates[method.method])


@lru_cache
def same_size(task: Task, method: Method) -> int:
    """The rank at which a method trains as many parameters as LoRA does on the task's own layers, or the next
    below.

    Raises:
        ConfigError: the method is refused.
    """
    folder = tempfile.gettempdir()
    wanted = Run(configured(task, METHODS[REFERENCE], []), folder, keeps=False).prepared.trained
    config = configured(task, method, [])
    lora = lora_config(config)
    config.method = "none"
    model = Run(config, folder, keeps=False).task
    low, high = 1, LARGEST
    while low < high:
        middle = (low + high + 1) // 2
        small = plan(model, replace(lora, rank=middle)).trainable <= wanted
        low, high = (middle, high) if small else (low, middle - 1)
    return low


def tested(task: Task, run: Run) -> Found:
    """Scores of the test data and of the source domain, there with the adapter on and off if it can be."""
    metrics = _test(run, run.data)
    found: Found = {"test": _percent(metrics[f"test/{task.score}"])}
    if task.source:
        on, off = task.source
        found["source"] = _percent(metrics.get(f"test/{on}"))
        if off:
            found["source_off"] = _percent(metrics.get(f"test/{off}"))
    switchable = run.method in ("lora", "linear_probe", "bitfit", "norm_only")
    if task.source_data is not None:
        found["source"] = _percent(_test(run, task.source_data())[f"test/{task.score}"])
    if switchable and "source_off" not in found:
        with adapters_off(run.task):
            data = task.source_data() if task.source_data else run.data
            name = task.source[0] if task.source else task.score
            found["source_off"] = _percent(_test(run, data)[f"test/{name}"])
    return found


def _test(run: Run, data: Any) -> dict[str, float]:
    return dict(trainer().test(run.task, datamodule=data, verbose=False)[0])


def trained(run: Run) -> int:
    """Parameters that train, counted after the fit, when all are there."""
    return (
        0
        if run.method == "none" and run.prepared.peft is None
        else sum(p.numel() for p in run.task.parameters() if p.requires_grad)
    )


def _rank(run: Run) -> int | None:
    return run.config.lora.rank if run.method in ("lora", "peft") or run.prepared.peft else None


def _own_callbacks(run: Run) -> list[L.Callback]:
    """Those that a method's words have chosen."""
    nodes = [node for node in run.callbacks if not str(node["_target_"]).endswith(OWN)]
    return [instantiate(node, _convert_="all") for node in nodes]


def _percent(value: Any) -> float | None:
    number = None if value is None else float(value)
    return round(100 * number, 3) if number is not None and math.isfinite(number) else None


class Cost(L.Callback):
    """What a step keeps: bytes saved for the backward by the first one, and of gradients and the optimizer's
    state at the end."""

    def __init__(self) -> None:
        self.saved, self.state = 0, 0
        self._open = contextlib.ExitStack()
        self._kept: dict[int, int] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self._kept is None:
            self._kept = self._open.enter_context(saving(module))

    def on_before_backward(self, *_: Any) -> None:
        if not self.saved:
            self.saved = sum((self._kept or {}).values())
            self._open.close()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        states = (s for o in trainer.optimizers for s in o.state.values())
        tensors = [t for state in states for t in _tensors(state)]
        self.state = sum(t.nbytes for t in tensors)
        self.state += sum(p.nbytes for p in module.parameters() if p.requires_grad)  # their gradients


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    for value in state.values() if isinstance(state, dict) else ():
        if isinstance(value, torch.Tensor):
            yield value
