"""What a run is called in the trackers: a name that says what it is, its group, and words to find it by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_lightning.app.loggers_wandb import in_sweep
from lora_lightning.app.methods import compared
from lora_lightning.files.origin import is_place

LONGEST, LONGEST_TAG, LONGEST_VALUE = 128, 64, 24  # characters; the first two are W&B's limits
UNSAID = ("recipe", "tags", "run_dir", "ckpt_path", "compare", "method", "threads", "adapters", "tune")
UNSAID_GROUPS = ("logger", "callbacks", "hydra", "rates", "tuning", "search", "hparams_search")
QUIET = ("trainer.enable_progress_bar", "trainer.log_every_n_steps")  # change nothing that is trained
VARIABLES = {"name": "WANDB_NAME", "group": "WANDB_RUN_GROUP"}  # W&B's own, which come first


@dataclass(frozen=True)
class RunName:
    """How a run is called.

    Attributes:
        words: recipe, adapter of several, method, and the options in which it differs from the recipe.
        method: the place of the method among the words.
        group: of the runs that belong together; None of a run that is alone.
        tags: to find it by.
    """

    words: Sequence[str]
    method: int
    group: str | None
    tags: Sequence[str]

    @property
    def text(self) -> str:
        """At most as long as trackers take."""
        whole = " ".join(self.words)
        return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 1]}…"

    def of_method(self, method: str) -> RunName:
        """What a method is called that the run is compared with."""
        words, mine = list(self.words), self.words[self.method]
        words[self.method] = method
        return replace(self, words=words, tags=[method if tag == mine else tag for tag in self.tags])


def run_name(config: DictConfig, adapter: str = "") -> RunName:
    """By what Hydra knows of the command line.

    Args:
        adapter: its name, where a run trains several.
    """
    context = HydraConfig.get()
    recipe = Path(str(context.runtime.choices.get("recipe"))).stem
    before = [recipe, *([adapter] if adapter else [])]
    choices = [context.runtime.choices.get(group) for group in ("data", "model")]
    tags = [recipe, adapter, config.method, *map(str, filter(None, choices)), *(config.get("tags") or ())]
    return RunName(
        [*before, config.method, *differing(context.overrides.task)],
        len(before),
        _group(config, context, recipe, bool(adapter)),
        [tag[:LONGEST_TAG] for tag in dict.fromkeys(filter(None, tags))],
    )


def differing(overrides: Sequence[str]) -> list[str]:
    """The options of a command line that change what is trained, shortly: `rank=16`. What names a place of
    this machine is left out."""
    pairs = [word.lstrip("+~").partition("=")[::2] for word in overrides]
    kept = [(key, value) for key, value in pairs if _is_said(key, value)]
    last = [key.rpartition(".")[2] for key, _ in kept]
    words = []
    for (key, value), short in zip(kept, last, strict=True):
        value = value if len(value) <= LONGEST_VALUE else f"{value[: LONGEST_VALUE - 1]}…"
        words.append(f"{short if last.count(short) == 1 else key}={value}")
    return words


def named_nodes(config: DictConfig, name: RunName, first: bool = True) -> dict[str, Any]:
    """The nodes of the group `logger`, plain, each with this name and group where it has none of its own, and
    with these tags too.

    Args:
        first: whether it is the run itself, and not a method that it is compared with.
    """
    nodes: Any = OmegaConf.to_container(config.get("logger") or OmegaConf.create({}), resolve=True)
    for node in nodes.values():
        if not isinstance(node, dict) or "tags" not in node:
            continue
        by_variable = first and str(node.get("_target_")).endswith("wandb_logger")
        for key, value in (("name", name.text), ("group", name.group)):
            set_outside = by_variable and os.environ.get(VARIABLES[key])
            if node.get(key) is None and not set_outside:
                node[key] = value
        if not first:
            node["name"] = name.text
        node["tags"] = list(dict.fromkeys([*name.tags, *(node["tags"] or ())]))
        if "job_type" in node:
            node["job_type"] = node["job_type"] or name.words[name.method]
    return nodes


def _group(config: DictConfig, context: HydraConf, recipe: str, several: bool) -> str | None:
    """The folder in which all of them lie, under the recipe's name."""
    if in_sweep():  # which is a group already
        return None
    if context.mode == RunMode.MULTIRUN:
        folder = Path(str(context.sweep.dir))
    elif several:
        folder = Path(config.run_dir).absolute().parent
    elif len([m for m in compared(config.method, config.compare) if m != "none"]) > 1:
        folder = Path(config.run_dir)
    else:
        return None
    return f"{recipe} {folder.absolute().name}"[:LONGEST]


def _is_said(key: str, value: str) -> bool:
    group, _, option = key.partition(".")
    named = key in UNSAID or group in UNSAID_GROUPS or key in QUIET
    return not named and "/" not in value and not is_place(option or key, value)
