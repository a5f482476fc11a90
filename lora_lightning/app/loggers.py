"""Experiment loggers: those of a run, made of its configuration, and the end of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lora_lightning.app.console import short_path
from lora_lightning.app.loggers_others import CometBeside
from lora_lightning.app.loggers_wandb import begin_beside, in_sweep, wandb_is_wanted
from lora_lightning.app.prepare import Prepared
from lora_lightning.app.run_names import RunName, named_nodes
from lora_lightning.trainer.hparams import PLAN, plan_rows
from lora_lightning.trainer.trackers.choice import tracker_of
from lora_lightning.trainer.trackers.tracker import sparing
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.mapping_file import NOTHING_RUN, read_mapping
from lora_lightning.utils.ranks import on_rank_zero
from lora_lightning.utils.wandb_key import has_wandb_key

IDS = "trackers.json"  # in a run's folder: the ids of its runs in the trackers, by their names
ID = re.compile(r"[\w-]{1,128}")


class Loggers(dict[str, Logger]):
    """Those of a run by their names in the group `logger`, in its order."""

    def all(self) -> list[Logger]:
        """As a Trainer takes them."""
        return list(self.values())


def build_loggers(config: DictConfig, name: RunName) -> Loggers:
    """The loggers of the group `logger`; none when it is null. With `choose`, W&B only
    where it can work.

    Args:
        name: of the run.
    """
    nodes = _chosen(named_nodes(config, name))
    return Loggers({key: instantiate(node, _convert_="all") for key, node in nodes.items()})


def loggers_beside(config: DictConfig, name: RunName, run: Loggers) -> Loggers:
    """The same for a method that the run is compared with, while those of the run are open: a run of its own
    in its group, where a tracker has such a thing.

    Args:
        config: of the method.
        name: of the run.
        run: its loggers.
    """
    made = Loggers()
    for key, node in _chosen(named_nodes(config, name.of_method(config.method), first=False)).items():
        before = run[key]
        if isinstance(before, CometLogger):
            made[key] = CometBeside(before, config.method)
        elif not isinstance(before, WandbLogger):
            if "parent" in node and on_rank_zero():
                node["parent"] = tracker_of(before).id()
            made[key] = instantiate(node, _convert_="all")
        elif not in_sweep():  # whose runs are the run's own method
            made[key] = begin_beside(instantiate(node, _convert_="all"))
    return made


def _chosen(nodes: dict[str, Any]) -> dict[str, Any]:
    if nodes.pop("choose", False) and not wandb_is_wanted(nodes["wandb"]):
        del nodes["wandb"]
    return {key: node for key, node in nodes.items() if node}


def chosen_in_words(config: DictConfig) -> str | None:
    """One line that says that W&B was left out, and how to have it; None where nothing was left out."""

    nodes = config.get("logger") or {}
    if not nodes.get("choose") or wandb_is_wanted(nodes["wandb"]):
        return None
    folder = short_path(Path(nodes["csv"]["save_dir"]) / "csv")
    if os.environ.get("WANDB_MODE") == "disabled":
        return f"Metrics go to {folder}: WANDB_MODE=disabled."
    remedy = "`wandb login` gives it one, logger=wandb keeps a run to upload later"
    return f"Metrics go to {folder}: W&B has no key here ({remedy})."


@rank_zero_only
def log_start(loggers: Loggers, config: Mapping[str, Any], prepared: Prepared) -> None:
    """Give every logger the resolved configuration and the parameter counts, and the plan that PEFT carries
    out; what LoRACallback adapts it tells itself."""
    counts = {
        "trainable": prepared.trained,
        "total": prepared.total,
        "percent": round(100 * prepared.trained / prepared.total, 4),
    }
    for logger in loggers.all():
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams({**config, "parameters": counts}, {"hp_metric": 0.0})
        else:
            logger.log_hyperparams({**config, "parameters": counts})
        if isinstance(logger, CSVLogger):
            logger.save()
        tracker = tracker_of(logger)
        tracker.begin()
        if prepared.peft and prepared.plan:
            tracker.table("plan", PLAN, plan_rows(prepared.plan))


@rank_zero_only
def keep_ids(loggers: Loggers, folder: Path) -> None:
    """Write the ids by which a run that goes on in its folder goes on in the trackers too."""
    ids = {key: tracker_of(logger).id() for key, logger in loggers.items()}
    if known := {key: value for key, value in ids.items() if value}:
        write_whole(folder / IDS, lambda file: Path(file).write_text(json.dumps(known, indent=2) + "\n"))


def give_ids(config: DictConfig, folder: Path) -> None:
    """Put in the ids that a run in the folder has kept, where none are given.

    Raises:
        AdapterFileError: their file is damaged.
    """
    if not (folder / IDS).is_file():
        return
    kept = read_mapping(folder / IDS, NOTHING_RUN)
    for key, node in (config.get("logger") or {}).items():
        known = kept.get(key)
        takes = isinstance(node, DictConfig) and "id" in node and node.id is None
        if takes and isinstance(known, str) and ID.fullmatch(known):
            node.id = known


def where(loggers: Sequence[Logger]) -> list[str]:
    """One line for each logger that needs a word: where a run goes, and how to upload or to see it."""
    lines = []
    for logger in loggers if on_rank_zero() else ():
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            if getattr(run, "offline", False):
                folder = short_path(Path(run.dir).parent)
                reason = "" if has_wandb_key() else " (there is no key)"
                lines.append(f"W&B runs offline{reason}. To upload: wandb sync {folder}")
            elif getattr(run, "url", None):
                lines.append(f"W&B: {run.url}")
        elif line := tracker_of(logger).where():
            lines.append(line)
    return lines


def finish(loggers: Loggers, status: str = "success") -> None:
    """Close every logger; W&B's run ends here, so that the next job of a sweep begins another."""
    for logger in loggers.all():
        with sparing(logger, "the end of the run"):
            _finish(logger, status)


def _finish(logger: Logger, status: str) -> None:
    logger.finalize(status)
    if isinstance(logger, WandbLogger) and logger._experiment is not None:  # else it never began
        logger._experiment.finish(exit_code=0 if status == "success" else 1)
    elif hasattr(logger, "end"):  # Aim's
        logger.end()
    elif isinstance(logger, CometLogger) and not isinstance(logger, CometBeside) and on_rank_zero():
        logger.experiment.end()
