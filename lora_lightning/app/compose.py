"""The configurations that Hydra finds and composes, by its public interface alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.app.recipe_file import RecipeFile
from lora_lightning.errors import ConfigError, did_you_mean
from lora_lightning.utils.marks import is_number

PACKAGE = Path(__file__).parents[1]
# Beside the package in a checkout, inside it when installed from a wheel.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF, RECIPES = HOME / "conf", HOME / "recipes"
CONFIG_NAME, VERSION_BASE = "train", "1.3"
SEARCHPATH = "hydra.searchpath"
USERS = "command-line"  # who provides the folder of --config-dir, as a run's folder tells it
# What Hydra raises for files that are no configurations: some of it unawares, as for `defaults: [null]`.
UNCOMPOSABLE = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError, AttributeError,
    AssertionError, RecursionError,
)  # fmt: skip


class Own(NamedTuple):
    """What of the user's own Hydra finds beside `conf/` and `recipes/`: the folder of `--config-dir`, and the
    file of `recipe=my.yaml`."""

    folder: Path | None = None
    recipe: Path | None = None


def _times(value: Any, factor: Any) -> Any:
    """`${times:A,B}` of a configuration; what is no number is left to the check of A or B."""
    return value * factor if is_number(value) and is_number(factor) else value


OmegaConf.register_new_resolver("times", _times, replace=True)

# For the search path that Hydra builds meanwhile.
_OWN: ContextVar[Own] = ContextVar("_OWN", default=Own())  # noqa: B039  # it cannot be changed


class RecipeSearchPath(SearchPathPlugin):
    """Lets Hydra find `recipe=NAME` in the recipes' folder, which lies beside `conf/`, and in the user's; a
    file that the user names comes first, since that very file is meant."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = _OWN.get()
        search_path.append("lora_lightning", f"file://{RECIPES}")
        if own.folder:
            search_path.append(USERS, f"file://{own.folder.absolute()}")
        if own.recipe:
            search_path.prepend(USERS, RecipeFile.place(own.recipe))


@contextlib.contextmanager
def searching(own: Own) -> Iterator[None]:
    """Meanwhile Hydra looks into the recipes' folder, and for what is the user's own."""
    for plugin in (RecipeFile, RecipeSearchPath):
        Plugins.instance().register(plugin)
    token = _OWN.set(own)
    try:
        yield
    finally:
        _OWN.reset(token)


@contextlib.contextmanager
def initialized(own: Own) -> Iterator[ConfigLoader]:
    """Hydra over all folders, also within an application of Hydra, which it leaves as it was."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with (
            searching(own),
            initialize_config_dir(str(CONF), job_name=CONFIG_NAME, version_base=VERSION_BASE),
        ):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


class Configurations:
    """What can be composed from `conf/`, `recipes/` and what is the user's own.

    Args:
        own: a folder and a recipe of the user's.
        searchpath: `hydra.searchpath=[…]` as it was given, for more folders.
    """

    def __init__(self, own: Own = Own(), searchpath: str | None = None) -> None:  # noqa: B008  # constant
        self.own = own
        self._searchpath = [searchpath] if searchpath else []
        self._choices: dict[str, tuple[str, ...]] = {}
        self._composed: dict[tuple[str, ...], DictConfig | str] = {}

    def compose(self, words: Sequence[str]) -> DictConfig:
        """The configuration of a command line's words, Hydra's own part in it.

        Raises:
            UNCOMPOSABLE: there is none.
        """
        with initialized(self.own):
            return compose(CONFIG_NAME, list(words), return_hydra_config=True)

    def compose_groups(self, groups: Sequence[str]) -> DictConfig | str:
        """The configuration of these group choices alone, not to be changed; or why there is none."""
        key = tuple(groups)
        if key not in self._composed:
            try:
                self._composed[key] = self.compose([*self._searchpath, *groups])
            except UNCOMPOSABLE as error:
                cause = error.__cause__ or error
                self._composed[key] = " ".join((str(error) or str(cause)).split())[:400]
        return self._composed[key]

    def choices(self, group: str) -> tuple[str, ...]:
        """The names that a group's folder holds; none for what is no group."""
        if group.partition("/")[0] not in self._folders:  # as most options: a listing is dear
            return ()
        if group not in self._choices:
            self._choices[group] = self._listed(group, ObjectType.CONFIG)
        return self._choices[group]

    def groups(self) -> tuple[str, ...]:
        """The groups that a user chooses from."""
        return tuple(group for group in self._folders if group != "hydra")

    @functools.cached_property
    def _folders(self) -> tuple[str, ...]:
        return self._listed("", ObjectType.GROUP)

    def loader(self) -> ConfigLoader:
        """Hydra's own, for what asks it which choices there are."""
        with initialized(self.own) as loader:
            return loader

    def _listed(self, group: str, kind: ObjectType) -> tuple[str, ...]:
        return tuple(sorted(self.loader().get_group_options(group, kind, CONFIG_NAME, self._searchpath)))


@functools.cache
def shipped() -> Configurations:
    """Those of this package alone, which stay as they are while a process runs."""
    return Configurations()


def recipe_config(recipe: str) -> dict[str, Any]:
    """The configuration of a recipe as plain values, without Hydra's own.

    Raises:
        ConfigError: there is no such recipe.
    """
    names = shipped().choices("recipe")
    if recipe not in names:
        near = did_you_mean(recipe, names)
        raise ConfigError([f"recipe={recipe}: there is no such recipe.{near} Recipes: {', '.join(names)}."])
    config = shipped().compose_groups([f"recipe={recipe}"])
    if isinstance(config, str):
        raise ConfigError([f"recipe={recipe}: {config}"])
    return plain_values(config)


def without_hydra(config: DictConfig, run_dir: str | None = ".") -> DictConfig:
    """A copy without Hydra's own part, which is not known where nothing runs; its folder is given.

    Args:
        run_dir: None where the configuration has its own.
    """
    config = config.copy()
    with open_dict(config):
        config.pop("hydra")
        if run_dir is not None:
            config.run_dir = run_dir
    return config


def plain_values(config: DictConfig) -> dict[str, Any]:
    """What a run's configuration holds, without Hydra's own part."""
    values: Any = OmegaConf.to_container(without_hydra(config), resolve=True)
    return dict(values)
