"""One training by one method: fit, test, and what was measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from lora_lightning.app.build import data_and_model, named, optim_config, plain
from lora_lightning.app.compress_options import BUDGETS
from lora_lightning.app.left import device_in_words
from lora_lightning.app.methods import ADAPTING
from lora_lightning.app.monitors import watching
from lora_lightning.app.options import precision_of
from lora_lightning.app.prepare import check_method, prepare
from lora_lightning.app.progress import Progress
from lora_lightning.app.results import Result, label
from lora_lightning.app.signatures import provided
from lora_lightning.compression.rebuild import DESCRIPTION, text_of
from lora_lightning.compression.result import Compressed
from lora_lightning.errors import AdapterFileError
from lora_lightning.files.random_base import forget_base, is_random, keep_base, put_back_base
from lora_lightning.tasks.reporting import AFTER, BASE, EXAMPLES, Reporting
from lora_lightning.trainer.checkpoint_io import WholeCheckpointIO
from lora_lightning.trainer.exact_resume import ExactResume
from lora_lightning.trainer.trackers.choice import most_examples
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.copying import Before
from lora_lightning.utils.ranks import on_rank_zero


class Run:
    """A task and its data, built from a configuration, to be trained by one method.

    Args:
        config: the composed configuration, whose `method` it is.
        folder: where checkpoints and logs go.
        keeps: whether it is the folder's own run: random weights are kept there, beside the adapters, its
            own or of a method that it is compared with, that are added to them, and its test keeps what its
            page shows, and asks the model as it was before, too.
    """

    def __init__(self, config: DictConfig, folder: str | Path, keeps: bool = True) -> None:
        self.method = config.method
        self.config = config.copy()
        self.config.run_dir = str(folder)
        pl.seed_everything(config.seed, workers=True, verbose=False)
        self.device = ""  # in words, once a Trainer has one
        self.data, model = data_and_model(self.config)
        self.keeps, self.on_random = keeps, is_random(self.config.model, model)
        adapts = not {self.method, *(config.compare or ())}.isdisjoint(ADAPTING)
        self._keeps, self._kept = keeps and adapts, False
        self.random_base = keeps and self.on_random and self.method in ADAPTING
        self._make(model)
        self._examples = EXAMPLES
        self.callbacks = watching(
            plain(self.config.callbacks) if self.config.get("callbacks") else {}, self.task
        )

    def _make(self, model: Any) -> None:
        """The task around a model, ready for the method."""
        with named("task"):
            self.task = instantiate(
                self.config.task,
                model=model,
                optim=optim_config(self.config).to_dict(),  # which Hydra can hold
                **provided(self.data, self.config.task),
                _convert_="all",
            )
        if isinstance(self.task, Reporting):
            self.task.pictured = self.keeps
            self.task.now = BASE if self.method == "none" else AFTER
        told = self._smaller()
        self._describe(told)
        if self._keeps:
            self._keep_base(told)
        for other in self.config.compare or ():
            check_method(self.task, other, self.config)  # now rather than after the training
        self.prepared = replace(prepare(self.task, self.config), compressed=told)
        if self.keeps and self.method == "full":
            self.prepared.before = Before(self.task.model)
        if isinstance(self.task, Reporting):
            self._tell_before(self.task)

    def _tell_before(self, task: Reporting) -> None:
        """Tell a task how its network is what it was before."""
        peft, before = self.prepared.peft, self.prepared.before
        task.off = peft.off if peft else None
        if before and not strategy_name(self.config.trainer).startswith("deepspeed"):  # which cuts weights up
            task.weights_before = before.again

    def _smaller(self) -> Compressed | None:
        """Make the task's network smaller, where that is wanted."""
        options = self.config.get("compress")
        if not options or not any(options.get(name) for name in BUDGETS):
            return None
        from lora_lightning.app.compressing import compress_task

        with named("compress"):
            return compress_task(self.task, self.data, plain(options))

    def _describe(self, told: Compressed | None) -> None:
        """Say how the network was made smaller in the run's folder: its checkpoints do not."""
        file = Path(self.config.run_dir) / DESCRIPTION
        if on_rank_zero() and told is None:
            file.unlink(missing_ok=True)
        elif on_rank_zero() and told is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = text_of(told)
            write_whole(file, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    @property
    def label(self) -> str:
        """The method in words."""
        return label(self.method, self.on_random)

    def _keep_base(self, told: Compressed | None) -> None:
        """Keep weights that nothing gives again beside the adapter, random or compressed; a run that goes
        on begins with those that it has kept."""
        folder, wanted = Path(self.config.run_dir), self.on_random or told is not None
        if wanted and (self.config.ckpt_path or self._kept):
            put_back_base(self.task.model, [folder])
        elif on_rank_zero():
            about = {"compressed": told.description()} if told else {}
            keep_base(self.task.model, folder, about) if wanted else forget_base(folder)
        self._kept = True

    def train_and_test(self, loggers: Sequence[Logger], ckpt_path: str | None = None) -> Result:
        """Fit, then test the best checkpoint, whose weights the task holds afterwards.

        Args:
            loggers: of the fit, which also learn the scores of the test.
            ckpt_path: a Trainer checkpoint to resume from.
        """
        self._examples = max(EXAMPLES, most_examples(loggers))
        if self.method == "none":
            return self._result(self._test(None))
        trainer = self._trainer(loggers)
        started = time.perf_counter()
        try:
            trainer.fit(self.task, datamodule=self.data, ckpt_path=ckpt_path, weights_only=True)
        except AdapterFileError as error:
            raise AdapterFileError(f"ckpt_path={ckpt_path}: {error}") from None
        self.prepared.decided(trainer.callbacks)
        seconds = time.perf_counter() - started
        seconds += sum((c.seconds_before for c in trainer.callbacks if isinstance(c, ExactResume)), 0.0)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
        score = _best_score(trainer)
        if self._sharded():  # what is tested and saved is whole again
            pl.seed_everything(self.config.seed, workers=True, verbose=False)  # for the same random weights
            self._make(data_and_model(self.config)[1])
        metrics = self._test(best)
        for logger in loggers:
            logger.log_metrics(metrics, trainer.global_step)
            logger.save()
        return self._result(
            metrics,
            seconds=seconds,
            checkpoint_bytes=_size(Path(kept)) if (kept := best or _last(trainer)) else None,
            best_validation=score,
        )

    def is_exact(self) -> bool:
        """Whether its test computes as a model by itself does."""
        return precision_of(self.config.trainer.precision) == "32-true"

    def validated(self, callbacks: Sequence[Callback] = (), what: str = "") -> float | None:
        """Fit without loggers or a test, and return the best validation score, if there is one.

        Args:
            callbacks: beside those of the configuration.
            what: is tried, for the progress bar.
        """
        trainer = self._trainer([], callbacks, what)
        trainer.fit(self.task, datamodule=self.data)
        return _best_score(trainer)

    def _result(self, metrics: Mapping[str, float], **cost: Any) -> Result:
        return Result(
            self.method,
            self._scores(metrics),
            self.prepared.trained,
            self.prepared.total,
            **cost,
            intervals=self._intervals(),
            scratch=self.on_random and self.method == "full",
        )

    def _scores(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {s.name: metrics[f"test/{s.name}"] for s in self.task.scores if f"test/{s.name}" in metrics}

    def _intervals(self) -> dict[str, tuple[float, float]]:
        """Of the scores just tested, where the task knows them."""
        return self.task.intervals() if hasattr(self.task, "intervals") else {}

    def _trainer(self, loggers: Sequence[Logger], beside: Sequence[Callback] = (), what: str = "") -> Any:
        callbacks: list[Callback] = [instantiate(node, _convert_="all") for node in self.callbacks]
        if not loggers:
            callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
        callbacks += self._progress(what or self.label)
        if speedups := self.config.get("speedups"):
            callbacks.append(instantiate(speedups))
        return self._make_trainer(
            callbacks=[*callbacks, *beside, *self.prepared.callbacks()],
            logger=list(loggers) or False,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        )

    def _progress(self, label: str) -> list[Callback]:
        """The bar, unless the configuration wants none."""
        wanted = self.config.trainer.get("enable_progress_bar", True) is not False
        return [Progress(label, self.prepared.trained)] if wanted else []

    def _sharded(self) -> bool:
        """Whether a fit leaves only a part of the task's parameters in this process."""
        return strategy_name(self.config.trainer).startswith(("fsdp", "modelparallel"))

    def _test(self, checkpoint: str | None) -> dict[str, float]:
        """On every process the whole test set, so that no image counts twice to fill up a batch."""
        trainer = self._make_trainer(
            callbacks=[*self._progress(self.label), *self.prepared.callbacks()],
            logger=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            profiler=None,
            **({"strategy": "ddp"} if self._sharded() else {}),
        )
        if isinstance(self.task, Reporting):
            self.task.kept_examples = self._examples
        options: dict[str, Any] = {"datamodule": self.data, "verbose": False, "weights_only": True}
        if getattr(self.task, "calibrate", False):  # by what it sees of the validation data
            trainer.validate(self.task, ckpt_path=checkpoint, **options)
            checkpoint = None
        return dict(trainer.test(self.task, ckpt_path=checkpoint, **options)[0])

    def _make_trainer(self, **options: Any) -> pl.Trainer:
        own = strategy_name(self.config.trainer).startswith(("fsdp", "deepspeed", "modelparallel"))
        trainer = instantiate(
            self.config.trainer,
            plugins=None if own else [WholeCheckpointIO()],  # those write checkpoints of their own
            default_root_dir=self.config.run_dir,
            enable_model_summary=False,
            _convert_="all",
            **options,
        )
        self.device = self.device or device_in_words(trainer)
        return trainer


def strategy_name(trainer: Mapping[str, Any]) -> str:
    """The strategy's name, or its class's, in small letters."""
    strategy = trainer["strategy"]
    name = strategy if isinstance(strategy, str) else strategy.get("_target_", "")
    return str(name).rpartition(".")[2].lower()


def _best_score(trainer: Any) -> float | None:
    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    return None if score is None else float(score)


def _last(trainer: Any) -> str | None:
    """A checkpoint of a fit that ended before any validation, of which therefore none is the best."""
    return next((c.best_model_path for c in trainer.checkpoint_callbacks if c.best_model_path), None)


def _size(checkpoint: Path) -> int:
    """Bytes of a checkpoint's file, or of all in its folder."""
    files = [checkpoint] if checkpoint.is_file() else [f for f in checkpoint.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)
