"""What a run's folder may bring into a run that goes on there: plain options, and classes that the package's
own configuration names. The folder may be somebody else's; what else the user wants, the user repeats."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lora_lightning.errors import AdapterFileError, ConfigError
from lora_lightning.files.allowed import BUILDERS, REFERENCE, calls
from lora_lightning.utils.mapping_file import parse_values, read_text

# What `conf/` names, which a test compares, and Lightning's callbacks that take plain options.
KNOWN = frozenset(
    {name for names in BUILDERS.values() for name in names}
    | {
        "datetime.timedelta",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.DeviceStatsMonitor",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.callbacks.EMAWeightAveraging",
        "lightning.pytorch.callbacks.GradientAccumulationScheduler",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.callbacks.RichModelSummary",
        "lightning.pytorch.callbacks.StochasticWeightAveraging",
        "lightning.pytorch.callbacks.Timer",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.profilers.SimpleProfiler",
        "lightning.pytorch.strategies.DDPStrategy",
        "lightning.pytorch.strategies.DeepSpeedStrategy",
        "lightning.pytorch.strategies.FSDPStrategy",
        "lightning.pytorch.strategies.ModelParallelStrategy",
        "lora_lightning.app.loggers_others.aim_logger",
        "lora_lightning.app.loggers_others.comet_logger",
        "lora_lightning.app.loggers_others.mlflow_logger",
        "lora_lightning.app.loggers_wandb.wandb_logger",
        "lora_lightning.app.preemption.Preemption",
        "lora_lightning.tasks.decoding.BeamDecoder",
        "lora_lightning.trainer.ema.EMA",
        "lora_lightning.trainer.gradient_norm.GradientNorm",
        "lora_lightning.trainer.speedups.Speedups",
        "torch.distributed.fsdp.wrap.size_based_auto_wrap_policy",
    }
)
READ, IMPORTED = (".yaml", ".yml"), tuple(all_suffixes())  # by Hydra, by Python
NOT_UNASKED = "is not run unasked, since the folder may be somebody else's"


def refuse_foreign(folder: Path, words: Sequence[str], given: Sequence[str]) -> None:
    """Refuse what would call or evaluate anything but what KNOWN names. Nothing is composed or imported.

    Args:
        folder: the run's.
        words: those of `.hydra/overrides.yaml` that are to come back.
        given: keys of the words on the command line, which the user answers for.

    Raises:
        ConfigError: one line for each such word; or the checkpoint is DeepSpeed's, which unpickles it.
    """
    problems = [
        f"resume={folder}: it began with {word}: {reason}; {NOT_UNASKED}. If you know what it does, give "
        f"resume={folder} {shlex.quote(word)}"
        for word in words
        if (reason := _reason(word))
    ]
    pickled = [p for p in folder.glob("**/checkpoints/last.ckpt") if p.is_dir()]
    if pickled and "ckpt_path" not in given:
        problems.append(
            f"resume={folder}: {pickled[0]} is a folder of DeepSpeed, which unpickles it: what it holds "
            f"{NOT_UNASKED}. If the run is yours, give resume={folder} ckpt_path=last"
        )
    if problems:
        raise ConfigError(problems)


def _reason(word: str) -> str:
    """Why a word is foreign, if it is."""
    try:
        override = OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError):
        return "it cannot be read"
    if "${" in REFERENCE.sub("", word):
        return "it holds what would be evaluated"
    if any("hydra" in (name or "").lower() for name in (override.key_or_group, override.package)):
        return "it changes Hydra itself"
    if override.is_sweep_override():
        return "it holds several values"
    tree: Any = override.value()
    for part in reversed(override.key_or_group.split(".")):
        tree = {part: tree}
    return f"it names {', '.join(found)}" if (found := calls(tree, "", KNOWN)) else ""


def refuse_foreign_recipes(folder: Path, recipes: Path) -> None:
    """Refuse a folder of recipes that a run's folder names (`--config-dir`) if any file in it would call or
    evaluate anything but what KNOWN names, changes Hydra itself, or could be imported.

    Raises:
        ConfigError: one line for each such file.
    """
    problems = [
        f"resume={folder}: it began with --config-dir {recipes}; {path}: {reason}; {NOT_UNASKED}. If the "
        f"recipes are yours, give --config-dir {shlex.quote(str(recipes))} resume={folder}"
        for path in sorted(path for path in recipes.rglob("*") if path.name.endswith((*READ, *IMPORTED)))
        if (reason := _reason_of_file(path, recipes))
    ]
    if problems:
        raise ConfigError(problems)


def refuse_foreign_recipe(folder: Path, file: Path) -> None:
    """Refuse the recipe that a run's folder names by its file (`recipe=my.yaml`) likewise. A file that is not
    there is told later.

    Raises:
        ConfigError: one line.
    """
    if file.is_file() and (reason := _reason_of_file(file, file.parent)):
        raise ConfigError([
            f"resume={folder}: it began with recipe={file}: {reason}; {NOT_UNASKED}. If the recipe is yours, "
            f"give resume={folder} {shlex.quote(f'recipe={file}')}"
        ])  # fmt: skip


def _reason_of_file(path: Path, recipes: Path) -> str:
    if path.name.endswith(IMPORTED):
        return "it is code"
    try:
        text = read_text(path, "")
        values = parse_values(text, path, "")
    except AdapterFileError as error:
        return f"it {str(error).removeprefix(str(path)).strip(' .')}"
    if "${" in REFERENCE.sub("", text):
        return "it holds what would be evaluated"
    if re.search(r"hydra", text + str(path.relative_to(recipes)), re.IGNORECASE):
        return "it changes Hydra itself"
    defaults = values.get("defaults") if isinstance(values, dict) else None
    if re.search(r"\.\.|\$|:/", str(defaults)):
        return "its defaults lead out of the folder"
    found = calls(values, "", KNOWN)
    return f"it names {', '.join(found)}" if found else ""
