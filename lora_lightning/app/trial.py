"""One training whose worth is told by validation data alone: what tuning and searches are made of."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from lora_lightning.app.run import Run
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.utils.ranks import on_rank_zero
from lora_lightning.utils.screens import screen_of


class Tried(NamedTuple):
    """What a trial gave.

    Attributes:
        score: the best of its epochs' in validation, as the Trainer's checkpoint watches it; None where it
            gave none, or one that is no number.
        monitor, mode: what is watched, and which is better, min or max.
        reason: why there is no score.
    """

    score: float | None
    monitor: str
    mode: str
    reason: str = ""

    def better(self, other: Tried) -> bool:
        """Whether this is worth more than another trial."""
        if self.score is None or other.score is None:
            return self.score is not None
        return self.score > other.score if self.mode == "max" else self.score < other.score


def watched(run: Run) -> tuple[str, str]:
    """What the run's checkpoint watches in validation, and which is better, min or max.

    Raises:
        ConfigError: nothing.
    """
    for node in run.callbacks:
        if str(node["_target_"]).endswith("ModelCheckpoint") and node.get("monitor"):
            return node["monitor"], node["mode"]
    raise ConfigError([
        "callbacks.checkpoint.monitor=null: nothing tells one trial from another; give auto, or a "
        "score of the validation."
    ])  # fmt: skip


def tried(config: DictConfig, folder: Path, callbacks: Sequence[Callback] = (), what: str = "") -> Tried:
    """Train as configured and say what validation gives; the test data are never touched, and nothing is left
    in the folder.

    Args:
        what: is tried, for the progress bar.

    Raises:
        ConfigError: the configuration watches nothing by which trials could be told apart.
    """
    one = config.copy()
    one.compare, one.ckpt_path, one.run_dir = [], None, str(folder)
    shown = one.trainer.get("enable_progress_bar", True) is not False
    one.trainer.enable_progress_bar = shown and screen_of().redraws  # a file has the trial's own line
    run = Run(one, folder, keeps=False)
    monitor, mode = watched(run)
    score, reason = None, ""
    try:
        score = run.validated(callbacks, what)
    except ConfigError:
        raise
    except UserError as error:  # such as a training that collapsed
        reason = str(error).splitlines()[0]
    finally:
        if on_rank_zero():
            shutil.rmtree(folder, ignore_errors=True)
    if score is None or not math.isfinite(score):
        score, reason = None, reason or f"{monitor} is no number"
    return Tried(score, monitor, mode, reason)


def shortened(config: DictConfig, fraction: float) -> DictConfig:
    """The same training in a fraction of its epochs, or of its steps, with its schedule over these."""
    one = config.copy()
    trainer: Any = one.trainer
    if isinstance(trainer.max_epochs, int) and trainer.max_epochs > 0:
        trainer.max_epochs = max(1, round(fraction * trainer.max_epochs))
        if isinstance(every := trainer.check_val_every_n_epoch, int):
            trainer.check_val_every_n_epoch = min(every, trainer.max_epochs)
    if trainer.max_steps > 0:
        trainer.max_steps = max(1, round(fraction * trainer.max_steps))
    return one
