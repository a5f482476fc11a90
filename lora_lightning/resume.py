"""What a Trainer's checkpoint holds so that a resumed run ends bit for bit as one that never stopped,
beyond what Lightning keeps: random numbers, gradients on their way, the order of the parameters."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError
from lora_lightning.loader import ResumableLoader
from lora_lightning.names import named_parameters
from lora_lightning.random_state import random_state, set_random_state
from lora_lightning.strategies import UNSHARDED
from lora_lightning.twins import is_a

KEY = "lora_lightning_progress"  # in a Trainer's checkpoint


class ExactResume(pl.Callback):
    """Lets a run resumed from a Trainer's checkpoint end bit for bit as one that never stopped, on the CPU
    and with a `ResumableLoader`, and refuses to give one parameter the optimizer state of another.

    `LoRACallback` is one; a Trainer without LoRA may have it by itself.

    Raises:
        AdapterFileError: when training begins with parameters in another order than the checkpoint's.
    """

    def __init__(self) -> None:
        self._progress: list[dict[str, Any]] | None = None  # of the run that is resumed
        self._order: list[list[str]] | None = None
        self._resumed = False  # and no batch done since
        self._random: dict[str, Any] | None = None  # at the last training batch

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._order is not None and is_a(trainer.strategy, *UNSHARDED):
            check_order(self._order, optimized_names(trainer, pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        align_loaders(trainer)
        self._order = None
        if self._progress is not None:
            go_on(trainer, pl_module, self._progress)
            self._progress = None
            self._resumed = True
        self._random = random_state()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._resumed = False

    def on_train_batch_start(self, *args: Any) -> None:
        """In the middle of an epoch, Lightning makes validation's iterator before the first batch."""
        if self._resumed and self._random is not None:
            set_random_state(self._random)
        self._resumed = False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._random = random_state()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation, whose loader alone draws a number, leaves the training's random numbers as they
        were: a resumed run may validate at other moments, when a validation was due at the checkpoint."""
        if self._random is not None and not trainer.sanity_checking:
            set_random_state(self._random)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._random = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        order = optimized_names(trainer, pl_module) if is_a(trainer.strategy, *UNSHARDED) else None
        checkpoint[KEY] = {"processes": progress_of(trainer, pl_module), "optimized": order}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return
        about = checkpoint.get(KEY, {})
        self._progress, self._order = about.get("processes"), about.get("optimized")


def progress_of(trainer: Any, model: nn.Module) -> list[dict[str, Any]]:
    """For each process: the state of its random numbers, and the gradients that it has accumulated since
    the last optimizer step. Every process must call it."""
    mine = {"random": random_state(), "gradients": _accumulated(trainer, model)}
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def go_on(trainer: Any, model: nn.Module, progress: list[dict[str, Any]]) -> None:
    """Take up what `progress_of` returned; to be called when the loaders' iterators exist.

    A run with another number of processes is not the same run: it goes on with its own random numbers.
    """
    if len(progress) != trainer.world_size:
        return
    mine = progress[trainer.global_rank]
    parameters = named_parameters(model)
    for name, gradient in mine["gradients"].items():
        parameters[name].grad = gradient.to(parameters[name].device)
    set_random_state(mine["random"])


def align_loaders(trainer: Any) -> None:
    """Let resumable loaders begin with the batch that the Trainer counts next: an exception may have
    come between loading a batch and training on it."""
    loop = trainer.fit_loop
    epoch = loop.epoch_progress.current
    if loop.restarting and epoch.ready == epoch.processed:
        # With max_steps, Lightning takes a finished epoch for one to go on with, and counts an empty one.
        base: Any = next(c for c in type(loop).__mro__ if c.__name__ == "_Loop")
        base.restarting.fset(loop, False)
        epoch.completed = epoch.processed
    batch = loop.epoch_loop.batch_progress.current.processed if loop.restarting else 0
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        if isinstance(loader, ResumableLoader):
            loader.start_at(batch if batch < trainer.num_training_batches else 0)


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
    stepped = batches.current.ready % trainer.accumulate_grad_batches == 0 or batches.is_last_batch
    if stepped or not trainer.lightning_module.automatic_optimization:
        return {}
    return {n: p.grad.detach().cpu() for n, p in named_parameters(model).items() if p.grad is not None}
