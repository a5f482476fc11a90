"""What a configuration leaves to data, decided from the Trainer's own training data before the fit: batches
as the training will see them, through the module's own `training_step`, of which nothing is logged and
nothing stays."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lora_lightning.adapters.by_data import Decision, decide
from lora_lightning.config import BY_GRADIENTS, LoRAConfig
from lora_lightning.errors import UserError
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.strategies import UNSHARDED

PLACES = ("sampler", "batch_sampler", "generator")  # of a loader: what knows where it stands
SILENT = (  # methods of a LightningModule that log, or want optimizers, which are not made yet
    "log", "log_dict", "optimizers", "lr_schedulers", "manual_backward", "clip_gradients", "toggle_optimizer",
    "untoggle_optimizer", "toggled_optimizer", "lr_scheduler_step",
)  # fmt: skip


def refuse_strategy(trainer: pl.Trainer, config: LoRAConfig) -> None:
    """Refuse strategies whose processes do not hold the whole model.

    Raises:
        UserError: this is one.
    """
    if not is_a(trainer.strategy, *UNSHARDED):
        raise UserError(
            f"{config.by_data}: decided by data on the whole model, which {type(trainer.strategy).__name__} "
            'shards: decide it with strategy="ddp" or on one device (max_steps=1 will do), '
            "and give the ranks of that plan in rank_pattern, with another init."
        )


def decide_in_fit(trainer: pl.Trainer, pl_module: pl.LightningModule, config: LoRAConfig) -> Decision:
    """The decision of the first process, from the training data of this fit, alike on every process.

    Every process runs its module, since a step may wait for the other processes.

    Raises:
        ConfigError, UserError: as `adapters.by_data.decide`; there are no training data, or the step fails.
    """
    step = partial(_step, trainer, pl_module, config)
    with _silenced(trainer, pl_module), _on_device(trainer, pl_module):
        batches = _batches(trainer, pl_module, config)
        try:
            decision = decide(pl_module, config, batches, step, *_beside(trainer))
        finally:
            batches.close()
    decided: Decision = trainer.strategy.broadcast(decision)
    return decided


def _beside(trainer: Any) -> list[Any]:
    return [] if trainer.datamodule is None else [trainer.datamodule]


def _step(trainer: Any, pl_module: pl.LightningModule, config: LoRAConfig, given: tuple[Any, int]) -> Any:
    """The module's `training_step` for a batch and its number, as the training calls it."""
    batch, number = given
    known = inspect.signature(pl_module.training_step).parameters.values()
    several = len(known) > 1 or any(p.kind is p.VAR_POSITIONAL for p in known)
    try:
        with _precision(trainer, pl_module):
            result = pl_module.training_step(*((batch, number) if several else (batch,)))
    except Exception as error:
        raise UserError(
            f"{type(pl_module).__name__}.training_step, which is run before the fit to see the data, failed "
            f"with {type(error).__name__}: {error}. Mend it, or give an init and ranks that need no data."
        ) from error
    if result is None and config.init in BY_GRADIENTS:
        raise UserError(
            f"{type(pl_module).__name__}.training_step returns no loss: return the loss, with manual "
            "optimization, too, detached or not."
        )
    return result


def _precision(trainer: Any, pl_module: pl.LightningModule) -> AbstractContextManager[Any]:
    """As the training's; but float16 without a scaler for the loss would lose small gradients, and a module
    that the Trainer makes half precision later still is float32."""
    plugin = trainer.precision_plugin
    if plugin.precision == "16-mixed" or (is_a(plugin, "HalfPrecision") and not _is_half(plugin, pl_module)):
        return nullcontext()
    context: AbstractContextManager[Any] = plugin.train_step_context()
    return context


def _is_half(plugin: Any, pl_module: nn.Module) -> bool:
    return all(
        p.dtype == plugin._desired_input_dtype for p in pl_module.parameters() if p.is_floating_point()
    )


def _batches(trainer: Any, pl_module: Any, config: LoRAConfig) -> Generator[tuple[Any, int], None, None]:
    """The first training batches as the module is given them, with their numbers."""
    loaders = trainer.fit_loop._data_source.dataloader()
    if not isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders, "max_size_cycle")
    apart = copy.copy(loaders)
    apart.flattened = [_apart(loader, config) for loader in loaders.flattened]
    most = config.data_batches
    for limit in (trainer.limit_train_batches, trainer.overfit_batches):
        most = min(most, limit) if isinstance(limit, int) and limit > 0 else most
    plugin = trainer.precision_plugin
    converts = not is_a(plugin, "HalfPrecision") or _is_half(plugin, pl_module)
    try:
        for number, (batch, _, _) in enumerate(apart):
            if number == most:
                break
            batch = plugin.convert_input(batch) if converts else batch
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = pl_module._apply_batch_transfer_handler(batch, trainer.strategy.root_device, 0)
            yield batch, number
    finally:
        apart.reset()  # which ends the workers


def _apart(loader: Any, config: LoRAConfig) -> Any:
    """A loader of the same samples which leaves the given one where it stands: its order, its generator and
    its workers are others.

    Raises:
        UserError: it can be read only once.
    """
    if not isinstance(loader, DataLoader):
        if iter(loader) is loader:
            raise UserError(
                f"{config.by_data}: the training data are a {type(loader).__name__}, which gives its batches "
                "only once, and the fit would miss the first: give a DataLoader or a list of batches."
            )
        return loader
    twin = copy.copy(loader)
    kept = _datasets(loader, {})
    for name in PLACES:
        if name in vars(loader):
            vars(twin)[name] = _copied(vars(loader)[name], kept, config)
    vars(twin)["_iterator"] = None
    return twin


def _copied(part: Any, kept: dict[int, Any], config: LoRAConfig) -> Any:
    """What knows where a loader stands, apart from it.

    Raises:
        UserError: it cannot be copied.
    """
    try:
        return copy.deepcopy(part, kept)
    except Exception as error:
        raise UserError(
            f"{config.by_data}: the {type(part).__name__} of the training data cannot be copied ({error}), "
            "and the fit would begin behind the batches that are looked at: let copy.deepcopy copy it, or "
            "decide with lora_lightning.inject(model, config, data=BATCHES) before the fit."
        ) from error


def _datasets(loader: DataLoader[Any], kept: dict[int, Any]) -> dict[int, Any]:
    """The data sets that a loader and its samplers know, which are not copied with them."""
    waiting: list[Any] = [loader, *(vars(loader).get(name) for name in PLACES)]
    seen: set[int] = set()
    while waiting:
        thing = waiting.pop()
        if thing is None or id(thing) in seen or not hasattr(thing, "__dict__"):
            continue
        seen.add(id(thing))
        for name, value in vars(thing).items():
            if isinstance(value, Dataset) or name in ("dataset", "data_source"):
                kept[id(value)] = value
            elif isinstance(value, torch.utils.data.Sampler):
                waiting.append(value)
    return kept


@contextmanager
def _silenced(trainer: Any, pl_module: pl.LightningModule) -> Iterator[None]:
    """Within this context the module logs nothing, and optimizers that it asks for do nothing."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    kept = {name: vars(pl_module)[name] for name in SILENT if name in vars(pl_module)}
    for name in SILENT:
        vars(pl_module)[name] = _Nothing(_optimizers(pl_module) if name == "optimizers" else 1)
    try:
        yield
    finally:
        trainer.loggers = loggers
        for name in SILENT:
            del vars(pl_module)[name]
        vars(pl_module).update(kept)


class _Nothing:
    """Whatever is asked of it, it does nothing and is as many as are expected."""

    def __init__(self, count: int = 1) -> None:
        self._count = count

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _Nothing(self._count)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()

    def __getitem__(self, key: Any) -> Any:
        return _Nothing()

    def __iter__(self) -> Iterator[Any]:
        return iter([_Nothing() for _ in range(self._count)])

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *reason: Any) -> None:
        return None


def _optimizers(pl_module: pl.LightningModule) -> int:
    """How many a step with manual optimization takes apart."""
    if pl_module.automatic_optimization:
        return 1
    made: Any = pl_module.configure_optimizers()
    if not isinstance(made, (list, tuple)):
        return 1
    return len(made[0]) if made and isinstance(made[0], (list, tuple)) else len(made)


@contextmanager
def _on_device(trainer: Any, pl_module: pl.LightningModule) -> Iterator[None]:
    """Within this context the module is on the device of its training."""
    before = pl_module.device
    if before == trainer.strategy.root_device:
        yield
        return
    pl_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        pl_module.to(before)
