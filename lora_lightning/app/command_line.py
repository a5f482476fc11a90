"""The check of a command line: every mistake in it, all at once, before anything runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_lightning.app.arguments import parser_of
from lora_lightning.app.check import unimportable
from lora_lightning.app.compose import SEARCHPATH, Configurations, Own, plain_values, shipped
from lora_lightning.app.overriding import with_plus
from lora_lightning.app.recipe_file import named_file
from lora_lightning.app.signatures import without_imports
from lora_lightning.app.variants import check_variant, parted
from lora_lightning.errors import ConfigError, did_you_mean

RERUN = "--experimental-rerun"


class CommandLine:
    """The command line of `train`: Hydra's flags, and words for it to compose.

    Args:
        arguments: as in `sys.argv[1:]`.

    Raises:
        ConfigError: a flag that would run what a file holds.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        if any(len(a) > 2 and RERUN.startswith(a.partition("=")[0]) for a in arguments):  # cut short, too
            remedy = "would unpickle a file, which can run any code: give resume=FOLDER."
            raise ConfigError([f"{RERUN}: {remedy}"])
        self.flags, strays, self.problems = parser_of("train").read(arguments)
        self.problems += [_stray(word) for word in strays if word.startswith("-")]
        words = [*self.flags.words, *(word for word in strays if not word.startswith("-"))]
        recipe, words = named_file(words, self.problems)
        self.overrides = [o for word in words if (o := _parse(word, self.problems))]
        folder = Path(self.flags.config_dir) if self.flags.config_dir else None
        if folder and not folder.is_dir():
            self.problems.append(f"--config-dir {folder}: there is no such folder. Give one that there is.")
            folder = None
        searchpath = _searchpath(self.overrides, self.problems)
        self.overrides = [o for o in self.overrides if searchpath or o.key_or_group != SEARCHPATH]
        self.own = Own(folder, recipe)
        self.known = Configurations(self.own, searchpath) if any(self.own) or searchpath else shipped()
        self.words = [str(override.input_line) for override in self.overrides]  # that Hydra composes

    @property
    def shows(self) -> bool:
        """Whether Hydra will only show something, and run nothing."""
        return bool(self.flags.help or self.flags.cfg or self.flags.info or self._of_hydra)

    @property
    def _of_hydra(self) -> bool:
        """Whether this is about Hydra alone."""
        return bool(self.flags.hydra_help or self.flags.version or self.flags.shell_completion)

    def for_hydra(self) -> list[str]:
        """The same as Hydra's own parser reads it, flags first; `searching` knows what is the user's own."""
        given = {k: v for k, v in vars(self.flags).items() if v and k not in ("words", "config_dir")}
        flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in given.items()]
        return [*flags, *self.words]

    def check(self) -> DictConfig | None:
        """Check flags, names, types and ranges, each value of a sweep included; what the configuration names
        is imported last, when all else is sound.

        Returns:
            The configuration of a single run, Hydra's own part in it; None for a sweep, or to show something.

        Raises:
            ConfigError: one line for each mistake, all of them.
        """
        if self._of_hydra and not self.problems:
            return None
        with without_imports() if self.shows else contextlib.nullcontext():
            single, configs = self._check_variants()
        if self.shows:
            self.problems += self._log_problems()
        elif not self.problems:
            self.problems += [problem for config in configs for problem in unimportable(config)]
        if self.problems:
            raise ConfigError(list(dict.fromkeys(self.problems)))
        return None if self.shows or single is None or single.hydra.mode == RunMode.MULTIRUN else single

    def _check_variants(self) -> tuple[DictConfig | None, list[DictConfig]]:
        """The whole configuration, if there is but one; and what was checked."""
        overrides = self.overrides
        sweeps = [o for o in overrides if o.is_sweep_override()]
        if sweeps and not self.flags.multirun and not self._is_sweep():
            self.problems += map(_sweep_without_flag, sweeps)
            overrides = [o for o in overrides if o not in sweeps]
        whole = not (sweeps or self.flags.multirun or self.problems)
        single, configs = None, []
        for variant in _variants(overrides, self.known, self.problems):
            single, config = check_variant(self.known, variant, whole, self.problems)
            configs += [config] if config is not None else []
        self.words = self._as_composed(single)
        return single, configs

    def _as_composed(self, single: DictConfig | None) -> list[str]:
        """The words with the plus that Hydra wants for options that no file sets."""
        if single is not None:
            given: Any = OmegaConf.to_container(single.hydra.overrides, resolve=False)
            return [*given["hydra"], *given["task"]]
        groups, _ = parted(self.known, [o for o in self.overrides if not o.is_sweep_override()], [])
        config = self.known.compose_groups(groups)
        overrides = with_plus(config, self.overrides) if isinstance(config, DictConfig) else self.overrides
        return [str(override.input_line) for override in overrides]

    def _is_sweep(self) -> bool:
        """Whether the configuration asks for a sweep itself, as hparams_search=grid does."""
        modes = [o for o in self.overrides if o.key_or_group == "hydra.mode"]
        if modes:
            return str(modes[-1].value()).upper() == "MULTIRUN"
        groups, _ = parted(self.known, [o for o in self.overrides if not o.is_sweep_override()], [])
        config = self.known.compose_groups(groups)
        return isinstance(config, DictConfig) and config.hydra.mode == RunMode.MULTIRUN

    def _log_problems(self) -> list[str]:
        """Logging that a recipe configures: Hydra sets it up before it shows anything, by what it names."""
        if self.known is shipped():  # whose recipes do not
            return []
        groups = [str(o.input_line) for o in self.overrides if self.known.choices(o.key_or_group)]
        logs = [
            OmegaConf.to_container(config.hydra.hydra_logging, resolve=False)
            for config in (self.known.compose_groups(groups), shipped().compose_groups(()))
            if isinstance(config, DictConfig)
        ]
        if any(log != logs[-1] for log in logs):
            return ["hydra.hydra_logging: is changed by a recipe; to look at that, leave the change out."]
        return []


def command_config(words: Sequence[str]) -> dict[str, Any]:
    """The configuration that `recipe=NAME key=value …` make, as plain values, without Hydra's own.

    Raises:
        ConfigError: one line for each mistake.
    """
    config = CommandLine(words).check()
    if config is None:
        raise ConfigError([f"{' '.join(words)}: asks for several runs; give one configuration."])
    return plain_values(config)


def _stray(flag: str) -> str:
    bare = flag.lstrip("-")
    if "=" in bare:
        return f"{flag}: options have no dashes here; give {bare}."
    flags = parser_of("train").flags
    return f"{flag}: there is no such flag.{did_you_mean(flag, flags)} Give one of {', '.join(flags)}."


def _parse(word: str, problems: list[str]) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError) as error:
        key, equals, value = word.partition("=")
        if not equals:
            remedy = f"give {key or 'key'}=VALUE."
        else:
            remedy = (
                f"cannot be read ({str(error).splitlines()[0]}). Put a text with special characters "
                f"in two kinds of quotes: '{key}=\"{value}\"'."
            )
        problems.append(f"{word or repr(word)}: {remedy}")
        return None


def _searchpath(overrides: Sequence[Override], problems: list[str]) -> str | None:
    """hydra.searchpath as it was given, if its folders are there."""
    given = next((o for o in overrides if o.key_or_group == SEARCHPATH), None)
    if given is None or given.is_sweep_override():
        return None
    value, word = given.value(), str(given.input_line)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        problems.append(f"{word}: give a list of folders, such as [file:///home/me/recipes].")
        return None
    folders = [Path(v.removeprefix("file://")) for v in map(str, value) if not v.startswith("pkg://")]
    absent = [
        f"{word}: there is no folder {folder}: give one that there is."
        for folder in folders
        if not folder.is_dir()
    ]
    problems += absent
    return None if absent else word


def _sweep_without_flag(override: Override) -> str:
    key, _, value = str(override.input_line).partition("=")
    return (
        f"{override.input_line}: several values need the flag -m, one run for each;"
        f" for one list give {key}=[{value}]."
    )


def _variants(
    overrides: Sequence[Override], known: Configurations, problems: list[str]
) -> Iterator[list[Override]]:
    """Override lists without sweeps that hold each value of each sweep at least once."""
    lists = [_values(o, known, problems) if o.is_sweep_override() else [o] for o in overrides]
    lists = [values for values in lists if values]
    first = [values[0] for values in lists]
    yield first
    for position, values in enumerate(lists):
        for value in values[1:]:
            yield [*first[:position], value, *first[position + 1 :]]


def _values(override: Override, known: Configurations, problems: list[str]) -> list[Override]:
    override.config_loader = known.loader()
    if not override.is_discrete_sweep():
        problems.append(
            f"{override.input_line}: an interval needs another sweeper; give values, such as"
            f" {override.key_or_group}=1,2,4, or range(1,4)."
        )
        return []
    key = override.get_key_element()
    words = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not words:
        problems.append(f"{override.input_line}: holds no value: give one or more.")
    return [o for word in words if (o := _parse(word, problems))]
