"""Where Lightning's loops take a run up again. By itself, after a checkpoint of an epoch's last step or of a
step with a validation due, Lightning leaves out that validation, the epoch's end and the next one's start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import CombinedLoader

from lora_lightning.trainer.loader import ResumableLoader

COUNTERS = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
FIELDS = ("ready", "started", "processed", "completed")  # of a progress, in the order in which they count


@dataclass(frozen=True)
class Place:
    """Where in the loops a checkpoint was written.

    Attributes:
        kind: "epoch", between two epochs; "step", between two batches; "batch", within a batch, which is
            done again.
        step: optimizer steps done.
        validated: no validation is due any more after the last batch.
        ending: the epoch's end had begun, and the schedulers that watch a metric had not had their step.
    """

    kind: str
    step: int
    validated: bool = True
    ending: bool = False


def settle(checkpoint: dict[str, Any], validated: bool | None) -> Place | None:
    """Change a checkpoint's counters of the fit's loops, so that Lightning goes on behind what was done and
    with the first thing that was not.

    Args:
        checkpoint: a Trainer's; its entry "loops" changes.
        validated: whether a validation has ended since the last batch; None where the checkpoint does not
            tell, as one of plain Lightning.

    Returns:
        None for a checkpoint without such counters.
    """
    loops, step = checkpoint.get("loops", {}).get("fit_loop", {}), checkpoint["global_step"]
    if any(name not in loops for name in COUNTERS):
        return None
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    now, current = epoch["current"], batch["current"]
    if now["processed"] == now["started"]:
        ending = now["completed"] < now["processed"]
        for progress in (epoch["total"], epoch["current"]):
            progress["ready"] = progress["completed"] = progress["processed"]
        return Place("epoch", step, ending=ending)
    if not 0 < current["ready"] == current["processed"]:
        return Place("batch", step)
    if validated is None:
        validated = current["completed"] == current["processed"]
    for progress in (batch["total"], batch["current"]):
        progress["completed"] = progress["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for progress in (validation["total"], validation["current"]):
        progress.update(dict.fromkeys(FIELDS, 0))
    if not validated:  # Lightning's sign of a validation to go back to
        validation["total"].update(ready=1, started=1)
    return Place("step", step, validated)


def take_up(trainer: Any, place: Place, max_steps: int | None = None) -> None:
    """Do what remains of the last step or epoch and has no hook; to be called when training starts, with the
    metrics and the schedulers of the checkpoint in place.

    Args:
        max_steps: the Trainer's, where they are done and it was given more, so that the fit begins at all.
    """
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if place.kind == "epoch":
        if place.ending:
            loop.epoch_progress.current.completed -= 1  # the epoch that its schedulers are asked for
            epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            loop.epoch_progress.current.completed += 1
        _stop_restarting(loop)  # with max_steps, Lightning takes a finished epoch for one to go on with
    elif place.kind == "batch":
        total = epoch_loop.batch_progress.total
        total.ready = total.started = total.processed
        # Counts batches, and makes an iterator for it, which draws a random number.
        instead_once(epoch_loop.val_loop, "increment_progress_to_evaluation_end", lambda: None)
    else:
        _finish_step(trainer, place, max_steps)


def _finish_step(trainer: Any, place: Place, max_steps: int | None) -> None:
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epoch_loop.val_loop.batch_progress.total.reset()
    over = epoch_loop._is_training_done or max_steps is not None  # the epoch has but to end
    due = epoch_loop._should_check_val_fx(loop._data_fetcher)
    if not due or (over and place.validated):  # otherwise Lightning does the same
        epoch_loop.update_lr_schedulers("step", update_plateau_schedulers=True)
        epoch_loop._batches_that_stepped += not epoch_loop._should_accumulate()
        if over:
            instead_once(epoch_loop, "on_run_start", lambda _: _end_epoch(epoch_loop, max_steps))
    loop._restarting = False  # or its end leaves out the schedulers that watch a metric


def _end_epoch(epoch_loop: Any, max_steps: int | None) -> None:
    _stop_restarting(epoch_loop)
    if max_steps is not None:
        epoch_loop.max_steps = max_steps


def instead_once(owner: Any, name: str, call: Callable[..., Any]) -> None:
    """Let the next call of an object's method be another, this time alone."""

    def other(*args: Any) -> Any:
        del owner.__dict__[name]
        return call(*args)

    setattr(owner, name, other)


def align_loaders(trainer: Any) -> None:
    """Let resumable loaders begin with the batch that the Trainer counts next: an exception may have
    come between loading a batch and training on it."""
    loop = trainer.fit_loop
    batch = loop.epoch_loop.batch_progress.current.processed if loop.epoch_loop.restarting else 0
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        if isinstance(loader, ResumableLoader):
            loader.start_at(batch if batch < trainer.num_training_batches else 0)


def _stop_restarting(loop: Any) -> None:
    base: Any = next(c for c in type(loop).__mro__ if c.__name__ == "_Loop")
    base.restarting.fset(loop, False)  # and the loops within
