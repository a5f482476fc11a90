"""The application behind `python train.py` and `lora-lightning train`: torch is loaded last."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import hydra
from hydra.core.utils import configure_log, run_job
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from lora_lightning.app.arguments import at_home
from lora_lightning.app.command_line import CommandLine
from lora_lightning.app.compose import CONF, CONFIG_NAME, VERSION_BASE, searching
from lora_lightning.app.console import say
from lora_lightning.app.jobs import Jobs
from lora_lightning.app.launch import (
    FAILED,
    PROGRAM,
    TRACEBACKS,
    hydra_raises,
    reported,
    started_with,
    wrapped,
)
from lora_lightning.app.resume import resumed
from lora_lightning.app.sweep import sweep_table


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the command line, then run the application.

    Args:
        arguments: in place of `sys.argv[1:]`.

    Raises:
        SystemExit: 2 after a user's mistake, 1 after a sweep of which a job failed, 130 after Ctrl-C.
    """
    script = sys.argv[0] if arguments is None else str(PROGRAM)
    given = at_home(sys.argv[1:] if arguments is None else arguments)
    jobs = Jobs(tracebacks=os.environ.get(TRACEBACKS) == "1")
    with hydra_raises(), reported(tracebacks=jobs.tracebacks):
        line = CommandLine(resumed(given))
        config = line.check()
        if not line.shows:
            importlib.import_module("lora_lightning.app.train")
        with started_with([script, *line.for_hydra()]):
            if config is None or _needs_hydra(config):
                _by_hydra(line, jobs)
            else:
                _single(line, config, jobs)
        if len(jobs.ended) > 1 or jobs.failed():
            say(f"\n{sweep_table(jobs.ended)}")
        if jobs.failed():
            raise SystemExit(FAILED)


def _needs_hydra(config: DictConfig) -> bool:
    """Whether a single run asks for what no public function of Hydra does: its own callbacks, debugging."""
    return bool(config.hydra.callbacks or config.hydra.verbose)


def _by_hydra(line: CommandLine, jobs: Jobs) -> None:
    """A sweep, with its sweeper and launcher; or what is shown."""
    application = hydra.main(config_path=str(CONF), config_name=CONFIG_NAME, version_base=VERSION_BASE)
    with searching(line.own), wrapped(line.flags.help):
        application(jobs.run)()


def _single(line: CommandLine, config: DictConfig, jobs: Jobs) -> None:
    """What was checked, run as a launcher of Hydra's does it."""
    config.hydra.mode = RunMode.RUN
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    context = HydraContext(line.known.loader(), Callback())  # type: ignore[arg-type] # typed as Hydra's many
    run_job(jobs.run, config, "hydra.run.dir", None, context).return_value  # noqa: B018 # raises what it raised
