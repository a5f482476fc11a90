"""What a Trainer's checkpoint holds so that a resumed run ends bit for bit as one that never stopped,
beyond what Lightning keeps: random numbers, gradients on their way, the order of the parameters."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError
from lora_lightning.loader import ResumableLoader
from lora_lightning.random_state import random_state, set_random_state


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
    parameters = dict(model.named_parameters())
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
    names = {id(p): n for n, p in model.named_parameters()}
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
    return {n: p.grad.detach().cpu() for n, p in model.named_parameters() if p.grad is not None}
