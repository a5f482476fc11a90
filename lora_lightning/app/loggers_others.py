"""The loggers of MLflow, Comet and Aim, each with what of a run goes there."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Annotated, Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from lora_lightning.app.options import ARTIFACT, TEXTS
from lora_lightning.trainer.trackers.tracker import Allowed, allow
from lora_lightning.utils.marks import at_least

# What MLflow's client finds out by itself and sends with a run; a tag of one's own comes before it.
FOUND_OUT = ("mlflow.user", "mlflow.source.name", "mlflow.source.git.commit")


def mlflow_logger(
    *,
    experiment: str = "lora_lightning",
    name: str | None = None,
    group: str | None = None,
    id: str | None = None,
    parent: str | None = None,
    tags: Annotated[Sequence[str], TEXTS] = (),
    tracking_uri: str | None = None,
    examples: Annotated[int, at_least(0)] = 8,
    adapter: bool = True,
    environment: bool = False,
) -> MLFlowLogger:
    """Lightning's MLFlowLogger.

    Args:
        group: by which runs that belong together are found: its tag `group`.
        id: of a run to go on with; `resume=FOLDER` gives it.
        parent: id of the run under which MLflow shows this one.
        tags: words to find the run by: its tag `tags`.
        tracking_uri: of the server or store; None is MLFLOW_TRACKING_URI, else `mlflow.db` in the folder in
            which the run was started, where `mlflow ui` looks.
        examples: how many pictures or sounds of the data go there at a time.
        adapter: whether the adapter goes there.
        environment: user, program and commit, which MLflow finds out.
    """
    known = {"group": group, "tags": ", ".join(tags), "mlflow.parentRunId": parent}
    kept = {} if environment else dict.fromkeys(FOUND_OUT, "-")
    logger = GoesOn(
        experiment_name=experiment,
        run_name=name,
        tracking_uri=tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db",
        tags={**kept, **{key: value for key, value in known.items() if value}},
        run_id=id,
    )
    return allow(logger, Allowed(examples, adapter))


class GoesOn(MLFlowLogger):
    """Lightning's, for runs that go on: MLflow takes no parameter a second time with another value, such as
    the checkpoint that the run goes on from; the first stays."""

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        known = self.experiment.get_run(self.run_id).data.params
        new = {
            key: value for key, value in _flatten_dict(_convert_params(params)).items() if key not in known
        }
        if new:
            super().log_hyperparams(new)


def comet_logger(
    *,
    project: str = "lora_lightning",
    name: str | None = None,
    workspace: str | None = None,
    group: str | None = None,
    id: str | None = None,
    tags: Annotated[Sequence[str], TEXTS] = (),
    save_dir: str = ".",
    offline: bool | None = None,
    examples: Annotated[int, at_least(0)] = 8,
    adapter: bool = True,
    artifact: Annotated[str | None, ARTIFACT] = None,
    hardware: bool = True,
    environment: bool = False,
    git: bool = False,
    code: bool = False,
    console: bool = False,
) -> CometLogger:
    """Lightning's CometLogger, which works without a key: then the run is kept in `save_dir`.

    Args:
        group: by which runs that belong together are found: one more of its tags.
        id: of a run to go on with; `resume=FOLDER` gives it.
        tags: words to find the run by.
        offline: None decides by whether there is a key.
        examples: how many pictures or sounds of the data go there at a time.
        adapter: whether the adapter goes there.
        artifact: what it is called; None is adapter-ID, by the run's id.
        hardware: the load of processors, memory, disks and GPUs.
        environment: the machine's name and kind, the command line, the installed packages.
        git: address and commit of the repository, and what was not committed.
        code: the started program.
        console: what is printed.
    """
    known = importlib.import_module("comet_ml").config.get_config()
    logger = OfflineToo(
        project=project,
        workspace=workspace,
        experiment_key=id,
        online=not (not known["comet.api_key"] if offline is None else offline),
        name=name,
        tags=[*tags, *([group] if group else [])],
        offline_directory=save_dir,
        log_code=code,
        log_git_metadata=git,
        log_git_patch=git,
        log_env_details=hardware or environment,
        log_env_host=environment,
        log_env_network=environment,
        log_env_cpu=hardware,
        log_env_gpu=hardware,
        log_env_disk=hardware,
        parse_args=environment,
        log_graph=False,
        auto_log_co2=False,
        auto_output_logging="default" if console else False,
        display_summary_level=0,
    )
    return allow(logger, Allowed(examples, adapter, artifact))


class OfflineToo(CometLogger):
    """Lightning's, which disables an offline experiment altogether (its issue 21617)."""

    def _create_experiment(self) -> None:
        self._comet_config = importlib.import_module("comet_ml").ExperimentConfig(**self._kwargs)
        super()._create_experiment()


class CometBeside(CometLogger):
    """The curves of another method under its name in the experiment of a run: Comet ends an experiment where
    another begins.

    Args:
        run: the logger of the run.
        method: the other one.
    """

    def __init__(self, run: CometLogger, method: str) -> None:
        self.__dict__.update({**run.__dict__, "_prefix": method})

    def log_hyperparams(self, params: Any) -> None:
        """Those of the run stay."""


def aim_logger(
    *,
    experiment: str = "lora_lightning",
    name: str | None = None,
    group: str | None = None,
    id: str | None = None,
    tags: Annotated[Sequence[str], TEXTS] = (),
    repo: str | None = None,
    examples: Annotated[int, at_least(0)] = 8,
    hardware: bool = True,
    environment: bool = False,
    console: bool = False,
) -> Logger:
    """Aim's own AimLogger.

    Args:
        group: by which runs that belong together are found: one more of its tags.
        id: of a run to go on with; `resume=FOLDER` gives it.
        tags: words to find the run by.
        repo: folder or address of the server; None is `.aim` in the folder in which the run was started.
        examples: how many pictures or sounds of the data go there at a time.
        hardware: the load of processors, memory and GPUs.
        environment: the command line, the installed packages, environment variables, the commit.
        console: what is printed.
    """
    theirs: Any = importlib.import_module("aim.pytorch_lightning").AimLogger

    class Open(theirs):
        """Stays open when a fit ends, since more is told afterwards, and opening it anew breaks its lock."""

        def finalize(self, status: str = "") -> None:
            """The Trainer's end is not the run's."""

        def end(self) -> None:
            super().finalize()

    made = Open(
        repo=repo,
        experiment=experiment,
        run_name=name,
        run_hash=id,
        system_tracking_interval=10 if hardware else None,
        log_system_params=environment,
        capture_terminal_logs=console,
    )
    made.lora_tags = [*tags, *([group] if group else [])]  # which its constructor does not take
    return allow(made, Allowed(examples, adapter=False))
