"""Experiment loggers: W&B with or without a key, and what every logger is told of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lora_lightning.app.console import short_path
from lora_lightning.app.options import TEXTS
from lora_lightning.planning.plan import Plan
from lora_lightning.utils.ranks import on_rank_zero
from lora_lightning.utils.wandb_key import has_wandb_key

OFFLINE_MODES = ("offline", "dryrun")


def build_loggers(config: DictConfig) -> list[Logger]:
    """The loggers of the group `logger`, in its order; none when it is null. With `choose`, of W&B and CSV
    only the one that can work here."""
    nodes = dict(config.get("logger") or {})
    if nodes.pop("choose", False):
        del nodes["csv" if wandb_is_wanted(nodes["wandb"]) else "wandb"]
    return [instantiate(node, _convert_="all") for node in nodes.values() if node]


def wandb_is_wanted(node: Mapping[str, Any]) -> bool:
    """Whether W&B can work as it is, or is asked for: a key, WANDB_MODE=offline, `offline=true`, a run to go
    on with."""
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        return False
    return bool(mode in OFFLINE_MODES or node.get("offline") or node.get("id") or has_wandb_key())


def chosen_in_words(config: DictConfig) -> str | None:
    """One line that says that CSV was chosen, and how to have W&B; None where nothing was chosen, or W&B,
    which `where` speaks of."""
    nodes = config.get("logger") or {}
    if not nodes.get("choose") or wandb_is_wanted(nodes["wandb"]):
        return None
    folder = short_path(Path(nodes["csv"]["save_dir"]) / "csv")
    if os.environ.get("WANDB_MODE") == "disabled":
        return f"Metrics go to {folder}: WANDB_MODE=disabled."
    remedy = "`wandb login` gives it one, logger=wandb keeps a run to upload later"
    return f"Metrics go to {folder}: W&B has no key here ({remedy})."


def wandb_logger(
    *,
    project: str = "lora_lightning",
    name: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    id: str | None = None,
    tags: Annotated[Sequence[str], TEXTS] = (),
    save_dir: str = ".",
    offline: bool | None = None,
) -> WandbLogger:
    """Lightning's WandbLogger, which works without a key: then the run is kept in `save_dir`.

    Args:
        id: of a run to go on with; `resume=FOLDER` gives it.
        tags: words to find the run by.
        offline: None decides by WANDB_MODE if that is set, else by whether there is a key.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if offline is None:
        offline = mode in OFFLINE_MODES if mode else not has_wandb_key()
    if offline:
        mode = "offline"
    logger = WandbLogger(
        project=project,
        name=name,
        save_dir=save_dir,
        entity=entity,
        group=group,
        id=id,
        tags=list(tags),
        mode=mode or "online",
        settings=wandb.Settings(silent=True),  # `where` says what is worth saying
    )
    logger._wandb_init.pop("anonymous", None)  # wandb warns of it even when it is None
    return logger


@rank_zero_only
def log_start(
    loggers: Sequence[Logger], config: Mapping[str, Any], trainable: int, total: int, plan: Plan | None
) -> None:
    """Give every logger the resolved configuration and the parameter counts, and W&B and TensorBoard
    the plan as a table."""
    counts = {
        "trainable": trainable,
        "total": total,
        "percent": round(100 * trainable / total, 4),
    }
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams({**config, "parameters": counts}, {"hp_metric": 0.0})
        else:
            logger.log_hyperparams({**config, "parameters": counts})
        if isinstance(logger, CSVLogger):
            logger.save()
    if plan is not None:
        log_plan(loggers, plan)


def log_plan(loggers: Sequence[Logger], plan: Plan) -> None:
    """Give W&B and TensorBoard the plan as a table."""
    rows = [[p.name, p.kind, "×".join(map(str, p.shape)), p.rank, p.alpha, p.parameters] for p in plan.layers]
    log_table(loggers, "plan", ("layer", "kind", "weight", "rank", "alpha", "parameters"), rows)


@rank_zero_only
def log_table(
    loggers: Sequence[Logger], name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """A table for the loggers that show tables: W&B and TensorBoard (as Markdown)."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, columns=list(header), data=[list(row) for row in rows])
        elif isinstance(logger, TensorBoardLogger):
            lines = [header, ["---"] * len(header), *rows]
            text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
            logger.experiment.add_text(name, text)


def where(loggers: Sequence[Logger]) -> list[str]:
    """One line for each logger that needs a word: where a W&B run goes, and how to upload it later."""
    lines = []
    for logger in loggers:
        if isinstance(logger, WandbLogger) and on_rank_zero():
            run = logger.experiment
            if getattr(run, "offline", False):
                folder = short_path(Path(run.dir).parent)
                reason = "" if has_wandb_key() else " (there is no key)"
                lines.append(f"W&B runs offline{reason}. To upload: wandb sync {folder}")
            elif getattr(run, "url", None):
                lines.append(f"W&B: {run.url}")
    return lines


def finish(loggers: Sequence[Logger], status: str = "success") -> None:
    """Close every logger; W&B's run ends here, so that the next job of a sweep begins another."""
    for logger in loggers:
        logger.finalize(status)
    if any(isinstance(logger, WandbLogger) for logger in loggers) and on_rank_zero():
        import wandb

        wandb.finish(exit_code=0 if status == "success" else 1)
