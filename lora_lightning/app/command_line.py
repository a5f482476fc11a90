"""The check of a command line: every mistake in it, all at once, before Hydra runs anything."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from lora_lightning.app.check import problems_of, unimportable
from lora_lightning.app.compose import CONFIG_NAME, choices_of, compose, config_loader, plain_values
from lora_lightning.app.options import show
from lora_lightning.app.overriding import apply_override
from lora_lightning.app.signatures import without_imports
from lora_lightning.app.user_modules import find_user_modules
from lora_lightning.errors import ConfigError, did_you_mean

SUBMITIT = ("slurm", "local")  # launchers
UNCHECKED = ("--hydra-help", "--version", "--shell-completion", "-sc")
RERUN = "--experimental-rerun"
HELP = ("--help", "-h")
ASKING = (*HELP, "--cfg", "-c", "--info", "-i")  # flags that show something and run nothing


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Hydra reads flags only before or after all `key=value` words, users write them anywhere."""
    words = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    return [a for a in arguments if a not in words] + words


def is_run(arguments: Sequence[str]) -> bool:
    """Whether Hydra will run the application, or only show something."""
    return not any(argument.partition("=")[0] in (*ASKING, *UNCHECKED) for argument in arguments)


def check_command_line(arguments: Sequence[str]) -> None:
    """Check flags, names, types and ranges of a whole command line, each value of a sweep included.

    All of it without importing what the configuration names; that comes last, when all else is sound.

    Args:
        arguments: as in `sys.argv[1:]`.

    Raises:
        ConfigError: one line for each mistake, all of them.
    """
    if any(len(a) > 2 and RERUN.startswith(a.partition("=")[0]) for a in arguments):  # argparse takes it cut
        raise ConfigError([f"{RERUN}: would unpickle a file, which can run any code: give resume=FOLDER."])
    if any(argument.partition("=")[0] in UNCHECKED for argument in arguments):
        return
    problems: list[str] = []
    flags, words = _flags(arguments, problems)
    overrides = [o for word in words if (o := _parse(word, problems))]
    loader = config_loader(flags.config_dir, _searchpath(overrides, problems))
    find_user_modules(source.path for source in loader.get_search_path().get_path())
    multirun = flags.multirun or _is_sweep(loader, overrides)
    if not multirun:
        problems += [_sweep_without_flag(o) for o in overrides if o.is_sweep_override()]
        overrides = [o for o in overrides if not o.is_sweep_override()]
    configs = []
    for variant in _variants(overrides, problems):
        with contextlib.nullcontext() if is_run(arguments) else without_imports():
            found, config = _check_variant(loader, variant)
        problems += found
        configs.append(config)
    if not is_run(arguments):
        problems += _log_problems(loader, overrides)
    if not problems and is_run(arguments):
        problems = [p for config in configs if config is not None for p in unimportable(config)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _log_problems(loader: ConfigLoaderImpl, overrides: Sequence[Override]) -> list[str]:
    """Logging that a recipe configures: Hydra sets it up before it shows anything, by what it names."""
    groups = tuple(str(o.input_line) for o in overrides if choices_of(loader, o.key_or_group))
    composed, ours = compose(loader, groups), compose(config_loader(None), ())
    logs = [
        OmegaConf.to_container(config.hydra.hydra_logging, resolve=False)
        for config in (composed, ours)
        if isinstance(config, DictConfig)
    ]
    if logs and any(log != logs[-1] for log in logs):
        return ["hydra.hydra_logging: is changed by a recipe; to look at that, leave the change out."]
    return []


def _flags(arguments: Sequence[str], problems: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError([f"{message}. `--help` lists the flags."])

    parser.error = refuse  # type: ignore[method-assign]
    known = [o for action in parser._actions for o in action.option_strings]
    strays = [a for a in arguments if a.startswith("-") and a.partition("=")[0] not in known]
    for stray in strays:
        bare = stray.lstrip("-")
        problems.append(
            f"{stray}: options have no dashes here; give {bare}."
            if "=" in bare
            else f"{stray}: there is no such flag.{did_you_mean(stray, known)}"
        )
    try:
        flags = parser.parse_args(flags_first([a for a in arguments if a not in strays]))
    except ConfigError as error:
        problems += error.problems
        return parser.parse_args([]), [a for a in arguments if "=" in a and not a.startswith("-")]
    if flags.config_dir and not Path(flags.config_dir).is_dir():
        problems.append(f"--config-dir {flags.config_dir}: there is no such folder.")
        flags.config_dir = None
    return flags, flags.overrides


def _parse(word: str, problems: list[str]) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError) as error:
        key, equals, value = word.partition("=")
        if not equals:
            remedy = f"give {key or 'key'}=VALUE."
        else:
            remedy = f"cannot be read ({str(error).splitlines()[0]}). Put a text with special characters"
            remedy += f" in two kinds of quotes: '{key}=\"{value}\"'."
        problems.append(f"{word or repr(word)}: {remedy}")
        return None


def _searchpath(overrides: Sequence[Override], problems: list[str]) -> tuple[str, ...]:
    """The folders of hydra.searchpath, in which recipes and groups are looked for too."""
    given = next((o for o in overrides if o.key_or_group == "hydra.searchpath"), None)
    if given is None or given.is_sweep_override():
        return ()
    value = given.value()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        problems.append(f"{given.input_line}: give a list of folders, such as [file:///home/me/recipes].")
        return ()
    folders = {v: Path(v.removeprefix("file://")) for v in map(str, value) if not v.startswith("pkg://")}
    problems += [f"{given.input_line}: there is no folder {f}." for f in folders.values() if not f.is_dir()]
    return tuple(map(str, value))


def _is_sweep(loader: ConfigLoaderImpl, overrides: Sequence[Override]) -> bool:
    """Whether the configuration asks for a sweep itself, as hparams_search=grid does."""
    groups = [
        o
        for o in overrides
        if not o.is_sweep_override()
        and (choices := choices_of(loader, o.key_or_group))
        and not _bad_choice(o, choices)
    ]
    modes = [o for o in overrides if o.key_or_group == "hydra.mode"]
    if modes:
        return str(modes[-1].value()).upper() == "MULTIRUN"
    config = compose(loader, tuple(str(o.input_line) for o in groups))
    return isinstance(config, DictConfig) and config.hydra.mode == RunMode.MULTIRUN


def _sweep_without_flag(override: Override) -> str:
    key, _, value = str(override.input_line).partition("=")
    return (
        f"{override.input_line}: several values need the flag -m, one run for each;"
        f" for one list give {key}=[{value}]."
    )


def _variants(overrides: Sequence[Override], problems: list[str]) -> Iterator[list[Override]]:
    """Override lists without sweeps that hold each value of each sweep at least once."""
    lists = [_values(o, problems) if o.is_sweep_override() else [o] for o in overrides]
    lists = [values for values in lists if values]
    first = [values[0] for values in lists]
    yield first
    for position, values in enumerate(lists):
        for value in values[1:]:
            yield [*first[:position], value, *first[position + 1 :]]


def _values(override: Override, problems: list[str]) -> list[Override]:
    override.config_loader = config_loader(None)
    if not override.is_discrete_sweep():
        problems.append(
            f"{override.input_line}: an interval needs another sweeper; give values, such as"
            f" {override.key_or_group}=1,2,4, or range(1,4)."
        )
        return []
    key = override.get_key_element()
    words = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not words:
        problems.append(f"{override.input_line}: holds no value.")
    return [o for word in words if (o := _parse(word, problems))]


def command_config(words: Sequence[str]) -> dict[str, Any]:
    """The configuration that `recipe=NAME key=value …` make, as plain values, without Hydra's own.

    Raises:
        ConfigError: one line for each mistake.
    """
    check_command_line(words)
    loader = config_loader(None)
    return plain_values(loader.load_configuration(CONFIG_NAME, list(words), run_mode=RunMode.RUN))


def _check_variant(
    loader: ConfigLoaderImpl, overrides: Sequence[Override]
) -> tuple[list[str], DictConfig | None]:
    """The problems of one run, and its configuration."""
    problems: list[str] = []
    groups, values = [], []
    for override in overrides:
        if choices := choices_of(loader, override.key_or_group):
            if problem := _missing_launcher(override) or _bad_choice(override, choices):
                problems.append(problem)
            else:
                groups.append(str(override.input_line))
        else:
            values.append(override)
    config = compose(loader, tuple(groups))
    while isinstance(config, str):
        bad = next(
            (g for g in groups if isinstance(compose(loader, (g,)), str)),
            groups[-1:] and groups[-1],
        )
        if not bad:
            return [*problems, config], None
        groups.remove(bad)
        reason = compose(loader, (bad,))
        problems.append(f"{bad}: {reason if isinstance(reason, str) else config}")
        config = compose(loader, tuple(groups))
    config = config.copy()
    disabled = OmegaConf.select(config, "lora.enabled") is False
    for override in values:
        key = override.key_or_group
        if disabled and key.startswith("lora.") and key != "lora.enabled":
            problems.append(f"{override.input_line}: lora=none adapts nothing; leave out this or lora=none.")
        else:
            problems += apply_override(loader, config, override)
    with open_dict(config):
        hydra = config.pop("hydra")
        if "run_dir" not in _keys(values):  # Hydra's own, which is not known here
            config.run_dir = "."
    return problems + _hydra_problems(hydra) + problems_of(config), config


def _keys(overrides: Sequence[Override]) -> list[str]:
    return [o.key_or_group for o in overrides]


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
    if value is None:
        return f"{group}=null: give one of {', '.join(choices)}; ~{group} leaves the group out."
    near = (
        did_you_mean(value, choices)
        if isinstance(value, str)
        else (f" To set one option: {group}.KEY=VALUE." if isinstance(value, dict) else "")
    )
    return f"{group}={show(value)}: give one of {', '.join(choices)}.{near}"


def _hydra_problems(hydra: DictConfig) -> list[str]:
    """Output folders that are no text; the rest of Hydra's own options Hydra has typed."""
    problems = []
    for name in ("run.dir", "sweep.dir"):
        value = OmegaConf.to_container(hydra[name.split(".")[0]], resolve=False)["dir"]  # type: ignore[call-overload,index]
        if not isinstance(value, str) or not value:
            problems.append(f"hydra.{name}={show(value)}: give a folder.")
    return problems
