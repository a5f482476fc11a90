"""What a Trainer's checkpoint holds so that a resumed run ends bit for bit as one that never stopped,
beyond what Lightning keeps: random numbers, gradients on their way, the order of the parameters."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError
from lora_lightning.trainer.averaging import finish_averages, go_on_averaging
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.resume_loops import Place, align_loaders, instead_once, settle, take_up
from lora_lightning.trainer.strategies import UNSHARDED
from lora_lightning.utils.names import named_parameters
from lora_lightning.utils.rng import random_state, set_random_state

KEY = "lora_lightning_progress"  # in a Trainer's checkpoint


class ExactResume(pl.Callback):
    """Lets a run resumed from a Trainer's checkpoint end bit for bit as one that never stopped, on the CPU
    and with a `ResumableLoader`, and refuses to give one parameter the optimizer state of another.

    `LoRACallback` is one; a Trainer without LoRA may have it by itself.

    Attributes:
        seconds_before: of training, that a resumed run has behind it.

    Raises:
        AdapterFileError: when training begins with parameters in another order than the checkpoint's.
    """

    def __init__(self) -> None:
        self.seconds_before = 0.0
        self._began = 0.0
        self._restored: dict[str, Any] = {}  # this class's entry in the checkpoint of the run that is resumed
        self._place: Place | None = None  # where that checkpoint was written
        self._steps: int | None = None  # of a run that has all its steps, and not yet its last epoch's end
        self._random: dict[str, Any] | None = None  # at the last training batch's end
        self._validated = True  # since then, if it was due

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        order = self._restored.get("optimized")
        if order is not None and is_a(trainer.strategy, *UNSHARDED):
            check_order(order, optimized_names(trainer, pl_module))
        loop = trainer.fit_loop.epoch_loop
        if self._place is not None and self._place.kind == "step" and 0 < loop.max_steps <= self._place.step:
            self._steps, loop.max_steps = loop.max_steps, loop.max_steps + 1  # or the fit would not begin

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated, self._began = True, time.perf_counter()
        if self._leads(trainer):
            self._random = random_state()
        if self._place is not None:
            self._go_on(trainer, pl_module, self._place)
        align_loaders(trainer)
        self._restored, self._place = {}, None

    def _go_on(self, trainer: Any, pl_module: pl.LightningModule, place: Place) -> None:
        if mine := progress_here(trainer, self._restored.get("processes")):
            self._random = mine["random"]
            loop = trainer.fit_loop  # its on_train_start, other callbacks' and the module's may draw numbers
            instead_once(loop, "on_advance_start", partial(_advance, loop, self._random))
            set_gradients(pl_module, mine["gradients"])
        trainer._logger_connector._callback_metrics.update(self._restored.get("metrics", {}))
        self._validated = place.validated
        go_on_averaging(trainer, pl_module, between_epochs=place.kind == "epoch")
        take_up(trainer, place, self._steps)
        trainer.should_stop |= self._restored.get("stopped", False)

    def on_train_batch_start(self, *args: Any) -> None:
        self._validated = False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._random = random_state()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._give_steps_back(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation, whose loader alone draws a number, leaves the training's random numbers as they
        were: a checkpoint may have been written before it, within it or after it."""
        if self._random is not None and not trainer.sanity_checking:
            set_random_state(self._random)
            self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._give_steps_back(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._random = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit that has nothing left to do ends without `on_train_end`."""
        if self._place is not None:
            finish_averages(trainer, pl_module)
            self._restored, self._place = {}, None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        within = trainer.validating or batch.ready != batch.processed  # and a resumed run does it again
        checkpoint[KEY] = {
            "processes": progress_of(trainer, pl_module, self._random if within else None),
            "optimized": optimized_names(trainer, pl_module) if is_a(trainer.strategy, *UNSHARDED) else None,
            "validated": self._validated,
            "metrics": {n: v.detach().cpu() for n, v in trainer.callback_metrics.items()},
            "stopped": stopped_early(trainer),
            "seconds": self.seconds_before + time.perf_counter() - self._began,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit" or not self._leads(trainer):
            return
        self._restored = checkpoint.get(KEY, {})
        self.seconds_before = self._restored.get("seconds", 0.0)
        self._place = settle(checkpoint, self._restored.get("validated"))

    def _leads(self, trainer: Any) -> bool:
        """Of several such callbacks the first takes a run up."""
        return next((c for c in trainer.callbacks if isinstance(c, ExactResume)), self) is self

    def _give_steps_back(self, trainer: pl.Trainer) -> None:
        if self._steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._steps = self._steps, None


def progress_of(trainer: Any, model: nn.Module, random: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """For each process: the state of its random numbers, this one's as given or as it is now, and the
    gradients that it has accumulated since the last optimizer step. Every process must call it."""
    mine = {"random": random or random_state(), "gradients": _accumulated(trainer, model)}
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def progress_here(trainer: Any, progress: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """This process's part of what `progress_of` returned.

    A run with another number of processes is not the same run: it goes on with its own random numbers.
    """
    if progress is None or len(progress) != trainer.world_size:
        return None
    return progress[trainer.global_rank]


def set_gradients(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Take up gradients that were accumulated before the run was stopped."""
    parameters = named_parameters(model)
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.to(parameters[name].device)


def stopped_early(trainer: Any) -> bool:
    """Whether EarlyStopping, whose state does not tell, has ended the run. What else ends one, such as a
    limit of time, is the resumed run's own affair."""
    return trainer.should_stop and any(
        is_a(c, "EarlyStopping") and c.stopped_epoch == trainer.current_epoch for c in trainer.callbacks
    )


def _advance(loop: Any, random: dict[str, Any]) -> None:
    set_random_state(random)
    loop.on_advance_start()


def optimized_names(trainer: Any, model: nn.Module) -> list[list[str]]:
    """Names of the parameters of each optimizer, in its order: its state is stored by number alone."""
    names = {id(p): n for n, p in named_parameters(model).items()}
    return [
        [names.get(id(p), "?") for group in optimizer.param_groups for p in group["params"]]
        for optimizer in trainer.optimizers
    ]


def check_order(stored: list[list[str]], here: list[list[str]]) -> None:
    """Refuse to give one parameter the optimizer state of another.

    Raises:
        AdapterFileError: with the first difference.
    """
    if len(stored) != len(here):
        raise AdapterFileError(
            f"the checkpoint holds the state of {len(stored)} optimizers and the module makes {len(here)}. "
            "Resume with the configure_optimizers that it was trained with."
        )
    for number, (there, ours) in enumerate(zip(stored, here, strict=True)):
        if there == ours:
            continue
        place = next((i for i, (a, b) in enumerate(zip(there, ours, strict=False)) if a != b), None)
        what = (
            f"{len(there)} parameters in the checkpoint, {len(ours)} now"
            if place is None
            else f"its parameter {place} was {there[place]} and is {ours[place]} now"
        )
        raise AdapterFileError(
            f"the optimizer's state in the checkpoint does not fit optimizer {number}: {what}. Make the "
            "optimizer's parameters in the order of the run that is resumed, or start without ckpt_path."
        )


def _accumulated(trainer: Any, model: nn.Module) -> dict[str, Tensor]:
    """Gradients between two optimizer steps; with manual optimization nobody can tell them from old ones."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    stepped = batches.current.processed % trainer.accumulate_grad_batches == 0 or batches.is_last_batch
    if stepped or not trainer.lightning_module.automatic_optimization:
        return {}
    return {n: p.grad.detach().cpu() for n, p in named_parameters(model).items() if p.grad is not None}
