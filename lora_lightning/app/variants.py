"""One run of a command line, or of a sweep: composed and checked, or why it cannot be composed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from lora_lightning.app.check import problems_of
from lora_lightning.app.compose import UNCOMPOSABLE, Configurations, without_hydra
from lora_lightning.app.logger_packages import ENDED
from lora_lightning.app.methods import unused_option
from lora_lightning.app.options import SEVERAL
from lora_lightning.app.overriding import apply_override, with_plus
from lora_lightning.app.user_modules import find_user_modules
from lora_lightning.errors import did_you_mean
from lora_lightning.utils.marks import show

SUBMITIT = ("slurm", "local")  # launchers


def check_variant(
    known: Configurations, overrides: Sequence[Override], whole: bool, problems: list[str]
) -> tuple[DictConfig | None, DictConfig | None]:
    """Check one run.

    Args:
        whole: compose all of it at once, as Hydra does; else, as for the many of a sweep, from its groups.

    Returns:
        The whole configuration, if it was composed; and what was checked, without Hydra's own part.
    """
    before = len(problems)
    groups, values = parted(known, overrides, problems)
    single = config = None
    if whole and len(problems) == before:
        single = config = _composed(known, overrides)
    if config is None and isinstance(chosen := known.compose_groups(groups), DictConfig):
        find_user_modules(chosen.hydra.runtime.config_sources)  # whose classes say what needs no plus
        values, before_plus = with_plus(chosen, values), values
        if whole and values != before_plus and len(problems) == before:
            single = config = _composed(known, with_plus(chosen, overrides))
    if config is None and (config := from_groups(known, groups, values, problems)) is None:
        return None, None
    find_user_modules(config.hydra.runtime.config_sources)
    problems += _unused(config, values)
    problems += _hydra_problems(config.hydra)
    given = any(o.key_or_group == "run_dir" for o in values)
    config = without_hydra(config, None if given else ".")
    problems += problems_of(config)
    return single, config


def _composed(known: Configurations, overrides: Sequence[Override]) -> DictConfig | None:
    with contextlib.suppress(*UNCOMPOSABLE):
        return known.compose([str(o.input_line) for o in overrides])
    return None


def parted(
    known: Configurations, overrides: Sequence[Override], problems: list[str]
) -> tuple[list[str], list[Override]]:
    """Choices of groups, each of which there is; and values."""
    groups, values = [], []
    for override in overrides:
        if choices := known.choices(override.key_or_group):
            if problem := _missing_launcher(override) or _bad_choice(override, choices):
                problems.append(problem)
            else:
                groups.append(str(override.input_line))
        else:
            values.append(override)
    return groups, values


def from_groups(
    known: Configurations, groups: list[str], values: Sequence[Override], problems: list[str]
) -> DictConfig | None:
    """What can be composed of these, one value after the other; problems name what cannot."""
    config = known.compose_groups(groups)
    while isinstance(config, str):
        bad = next((g for g in groups if isinstance(known.compose_groups([g]), str)), (groups or [""])[-1])
        if not bad:
            problems.append(config)
            return None
        groups.remove(bad)
        reason = known.compose_groups([bad])
        problems.append(f"{bad}: {reason if isinstance(reason, str) else config}")
        config = known.compose_groups(groups)
    config = config.copy()
    for override in values:
        problems += apply_override(known, config, override)
    return config


def _unused(config: DictConfig, values: Sequence[Override]) -> list[str]:
    """A line for each option that was given and that no method of the run uses."""
    plain: Any = OmegaConf.to_container(config)
    method, others = plain.get("method"), plain.get("compare")
    return [
        f"{o.input_line}: {reason}"
        for o in values
        if (reason := unused_option(o.key_or_group, method, others))
    ]


def _missing_launcher(override: Override) -> str | None:
    """Hydra finds no launcher whose plugin is not installed, and names neither."""
    value = override.value()
    asked = override.key_or_group == "hydra/launcher" and str(value).removeprefix("submitit_") in SUBMITIT
    if asked and find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        return f"hydra/launcher={value}: needs submitit: pip install 'lora-lightning[slurm]'"
    return None


def _bad_choice(override: Override, choices: Sequence[str]) -> str | None:
    group, value = override.key_or_group, override.value()
    if override.is_delete() or (isinstance(value, str) and value in choices):
        return None
    several = group in SEVERAL
    if several and isinstance(value, list) and value:
        wrong = next((v for v in value if v not in choices), None)
        if wrong is None:
            return None
        value = wrong if isinstance(wrong, str) else value
    if value is None:
        return f"{group}=null: give one of {', '.join(choices)}; ~{group} leaves the group out."
    if group == "logger" and isinstance(value, str) and value in ENDED:
        return f"logger={value}: {ENDED[value]}: give one of {', '.join(choices)}."
    near = (
        did_you_mean(value, choices)
        if isinstance(value, str)
        else (f" To set one option: {group}.KEY=VALUE." if isinstance(value, dict) else "")
    )
    more = ", or a list of them" if several else ""
    return f"{group}={show(override.value())}: give one of {', '.join(choices)}{more}.{near}"


def _hydra_problems(hydra: DictConfig) -> list[str]:
    """Output folders that are no text; the rest of Hydra's own options Hydra has typed."""
    folders: Any = OmegaConf.to_container(OmegaConf.create({k: hydra[k] for k in ("run", "sweep")}))
    return [
        f"hydra.{name}.dir={show(folders[name]['dir'])}: give a folder."
        for name in ("run", "sweep")
        if not isinstance(folders[name]["dir"], str) or not folders[name]["dir"]
    ]
