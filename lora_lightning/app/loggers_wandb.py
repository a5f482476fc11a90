"""W&B's logger: with or without a key, and what of a run goes there, each thing an option."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from lightning.pytorch.loggers import WandbLogger

from lora_lightning.app.options import ARTIFACT, TEXTS
from lora_lightning.trainer.trackers.tracker import Allowed, allow
from lora_lightning.utils.marks import at_least
from lora_lightning.utils.ranks import on_rank_zero
from lora_lightning.utils.wandb_key import has_wandb_key

OFFLINE_MODES = ("offline", "dryrun")
NAMELESS = "-"  # instead of the machine's name, which W&B would look up


def wandb_is_wanted(node: Mapping[str, Any]) -> bool:
    """Whether W&B can work as it is, or is asked for: a key, WANDB_MODE=offline, `offline=true`, a run to go
    on with."""
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        return False
    return bool(mode in OFFLINE_MODES or node.get("offline") or node.get("id") or has_wandb_key())


def wandb_logger(
    *,
    project: str = "lora_lightning",
    name: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
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
) -> WandbLogger:
    """Lightning's WandbLogger, which works without a key: then the run is kept in `save_dir`.

    Args:
        id: of a run to go on with; `resume=FOLDER` gives it.
        tags: words to find the run by.
        offline: None decides by WANDB_MODE if that is set, else by whether there is a key.
        examples: how many pictures or sounds of the data go there at a time.
        adapter: whether the adapter goes there, as an artifact.
        artifact: what it is called; None is adapter-ID, by the run's id.
        hardware: the load of processors, memory and GPUs.
        environment: the machine's name and kind, the command line, the installed packages.
        git: address and commit of the repository in which the run was started, and with them `environment`.
        code: the started program and what was not committed of it, and with them `environment`.
        console: what is printed.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if offline is None:
        offline = mode in OFFLINE_MODES if mode else not has_wandb_key()
    if offline:
        mode = "offline"
    described = environment or git or code  # which W&B keeps in one record
    settings = wandb.Settings(
        silent=True,  # `where` says what is worth saying
        console="auto" if console else "off",
        save_code=code,
        disable_code=not code,
        disable_git=not git,
        x_disable_meta=not described,
        x_save_requirements=described,
        x_disable_stats=not hardware,
    )
    if not described:
        settings.host = NAMELESS
    logger = WandbLogger(
        project=project,
        name=name,
        save_dir=save_dir,
        entity=entity,
        group=group,
        job_type=job_type,
        id=id,
        tags=list(tags),
        mode=mode or "online",
        settings=settings,
    )
    logger._wandb_init.pop("anonymous", None)  # wandb warns of it even when it is None
    return allow(logger, Allowed(examples, adapter, artifact))


def begin_beside(logger: WandbLogger) -> WandbLogger:
    """A logger whose run begins while another is open, which stays the one that W&B's functions mean."""
    if not on_rank_zero():
        return logger
    import wandb

    settings = logger._wandb_init["settings"].model_copy(update={"reinit": "create_new"})
    run = wandb.init(**{**logger._wandb_init, "settings": settings})
    run.define_metric("trainer/global_step")  # as Lightning's logger does with a run that it begins
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    logger._experiment = run
    return logger


def in_sweep() -> bool:
    """Whether an agent of a W&B sweep has started this process: the sweep wants one run of it."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))
