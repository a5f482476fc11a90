"""The jobs of one command line: a single run, or those of a sweep, each of which may fail by itself."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lora_lightning.app.console import say
from lora_lightning.app.interrupts import INTERRUPTED, interruptible
from lora_lightning.app.launch import PREEMPTED, Reported, one_job, quiet, reported
from lora_lightning.app.sweep import Ended
from lora_lightning.app.user_modules import find_user_modules
from lora_lightning.errors import UserError


class Jobs:
    """Runs jobs, and remembers what those of this process ended in.

    Args:
        tracebacks: the user wants them.
    """

    def __init__(self, tracebacks: bool) -> None:
        self.tracebacks = tracebacks
        self.ended: list[Ended] = []

    def run(self, config: DictConfig) -> float | None:
        """One job: the whole of a single run, or one of a sweep. Returns the best validation score.

        In a sweep a job that fails leaves its reason for the table, and the next one begins.
        """
        context = HydraConfig.get()
        if context.mode != RunMode.MULTIRUN:
            return self._run(config)
        if self.ended:
            say("")
        try:
            return self._run(config)
        except Reported as end:
            if end.code in (INTERRUPTED, PREEMPTED):
                raise
            reason = end.message
        except Exception as error:  # a bug, whose traceback is shown and which the other jobs may not meet
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        self.ended.append(Ended(context.overrides.task, None, reason=reason))
        if _one_after_the_other(context):
            return None
        raise UserError(reason)  # for a sweeper or launcher that counts failures itself

    def failed(self) -> list[Ended]:
        """Those that gave no result."""
        return [job for job in self.ended if job.result is None]

    def _run(self, config: DictConfig) -> float | None:
        # A launcher may have started this process without a command line of ours.
        find_user_modules(HydraConfig.get().runtime.config_sources)
        folder = Path(config.run_dir)
        with one_job(self.tracebacks), reported(folder, self.tracebacks), quiet(), interruptible():
            from lora_lightning.app import train

            return train.train(config, self.ended.append)


def _one_after_the_other(context: HydraConf) -> bool:
    """Whether the jobs run in this process for their own sake, by Hydra's own launcher and sweeper."""
    nodes: tuple[Any, ...] = (context.launcher, context.sweeper)
    targets = [str(node["_target_"]) for node in nodes]
    return all(target.rpartition(".")[2] in ("BasicLauncher", "BasicSweeper") for target in targets)
