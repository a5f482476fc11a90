"""The Hydra application behind `python train.py` and `lora-lightning train`: torch is loaded last."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lora_lightning.app.arguments import at_home
from lora_lightning.app.command_line import HELP, check_command_line, flags_first, is_run
from lora_lightning.app.compose import CONF, CONFIG_NAME, VERSION_BASE
from lora_lightning.app.console import say
from lora_lightning.app.interrupts import interruptible
from lora_lightning.app.launch import (
    FAILED,
    INTERRUPTED,
    PREEMPTED,
    PROGRAM,
    Reported,
    hydra_raises,
    one_job,
    quiet,
    reported,
    wrapped,
)
from lora_lightning.app.resume import resumed
from lora_lightning.app.sweep import ENDED, Ended, failed, sweep_table
from lora_lightning.app.user_modules import find_user_modules
from lora_lightning.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the command line, then run the application.

    Args:
        arguments: in place of `sys.argv[1:]`.

    Raises:
        SystemExit: 2 after a user's mistake, 1 after a sweep of which a job failed, 130 after Ctrl-C.
    """
    script = sys.argv[0] if arguments is None else str(PROGRAM)
    given = at_home(sys.argv[1:] if arguments is None else arguments)
    ENDED.clear()
    with hydra_raises(), reported():
        sys.argv = [script, *flags_first(resumed(given))]
        check_command_line(sys.argv[1:])
        if is_run(sys.argv[1:]):
            importlib.import_module("lora_lightning.app.train")
        with wrapped(any(flag in sys.argv for flag in HELP)):
            application()
        if len(ENDED) > 1 or failed():
            say(f"\n{sweep_table()}")
        if failed():
            raise SystemExit(FAILED)


@hydra.main(config_path=str(CONF), config_name=CONFIG_NAME, version_base=VERSION_BASE)
def application(config: DictConfig) -> float | None:
    """One job: the whole of a single run, or one of a sweep. Returns the best validation score.

    In a sweep a job that fails leaves its reason for the table, and the next one begins.
    """
    context = HydraConfig.get()
    if context.mode != RunMode.MULTIRUN:
        return _job(config)
    try:
        return _job(config)
    except Reported as end:
        if end.code in (INTERRUPTED, PREEMPTED):
            raise
        reason = end.message
    except Exception as error:  # a bug, whose traceback is shown and which the other jobs may not meet
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    ENDED.append(Ended(context.overrides.task, None, reason=reason))
    if _hydras_own(context):
        return None
    raise UserError(reason)  # for a sweeper or launcher that counts failures itself


def _job(config: DictConfig) -> float | None:
    # A launcher may have started this process without a command line of ours.
    find_user_modules(source.path for source in HydraConfig.get().runtime.config_sources)
    with one_job(), reported(Path(config.run_dir)), quiet(), interruptible():
        from lora_lightning.app.train import run

        return run(config)


def _hydras_own(context: HydraConf) -> bool:
    """Whether the jobs run in this process, one after the other, for their own sake."""
    nodes: tuple[Any, ...] = (context.launcher, context.sweeper)
    targets = [str(node["_target_"]) for node in nodes]
    return all(target.rpartition(".")[2] in ("BasicLauncher", "BasicSweeper") for target in targets)
