"""`resume=FOLDER`: a stopped run goes on in its folder, as it was begun, from its last checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig

from lora_lightning.app.foreign import refuse_foreign
from lora_lightning.errors import ConfigError, did_you_mean

WORD = "resume="
WANDB_RUN = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")


def resumed(arguments: Sequence[str]) -> list[str]:
    """The command line with `resume=FOLDER` written out; any other is returned as it is.

    The words that began the run come back, those given now replace them. The run keeps its folder and its
    W&B id; `ckpt_path=last` begins anew where there is no checkpoint yet.

    Raises:
        ConfigError: FOLDER is not a run's, or what began the run is not run unasked.
    """
    given = [a for a in arguments if not a.startswith(WORD)]
    if len(given) == len(arguments):
        return given
    folder = Path(next(a for a in arguments if a.startswith(WORD)).removeprefix(WORD))
    began = folder / ".hydra" / "overrides.yaml"
    if not began.is_file():
        near = [p.parent.parent for p in folder.parent.glob("*/.hydra/overrides.yaml")]
        raise ConfigError([
            f"resume={folder}: is not a run's folder: it has no .hydra/overrides.yaml. Give one that a run "
            f"has named, such as outputs/vit_digits/DATE.{did_you_mean(str(folder), map(str, near))}"
        ])  # fmt: skip
    own = [f"hydra.run.dir={_quoted(folder)}", "ckpt_path=last"]
    replaced = {_key(word) for word in [*given, *own]}
    before = [word for word in _words(began, folder) if _key(word) not in replaced]
    refuse_foreign(folder, before, [_key(word) for word in given])
    return [*given, *before, *own]


def _words(began: Path, folder: Path) -> list[str]:
    try:
        words = yaml.safe_load(began.read_text(encoding="utf-8")) or []
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = f"cannot be read: {' '.join(str(error).split())[:200]}. Nothing in it was run."
        raise ConfigError([f"resume={folder}: {began} {reason}"]) from None
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise ConfigError([f"resume={folder}: {began} is damaged: it is no list of KEY=VALUE."])
    return words


def wandb_run(folder: Path) -> str | None:
    """The id of the W&B run that was last logged to a run's folder."""
    found = [match for path in folder.glob("wandb/*") if (match := WANDB_RUN.fullmatch(path.name))]
    return max(found, key=lambda match: match[1])[2] if found else None


def continue_logs(config: DictConfig, folder: Path) -> None:
    """Let a run that goes on in its own folder go on with its W&B run too, and put its CSV file of metrics
    aside as metrics.1.csv, …: Lightning's logger would delete it."""
    wandb = (config.get("logger") or {}).get("wandb")
    if wandb and wandb.id is None:
        wandb.id = wandb_run(folder)
    metrics = folder / "csv" / "metrics.csv"
    if metrics.is_file():
        number = 1 + len(list(metrics.parent.glob("metrics.*.csv")))
        metrics.rename(metrics.with_name(f"metrics.{number}.csv"))


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~").partition("@")[0]


def _quoted(value: object) -> str:
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
