"""The configuration that Hydra composes, found and loaded as a run does it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.errors import ConfigError, did_you_mean

PACKAGE = Path(__file__).parents[1]
# Beside the package in a checkout, inside it when installed from a wheel.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF, RECIPES = HOME / "conf", HOME / "recipes"
CONFIG_NAME, VERSION_BASE = "train", "1.3"
# What Hydra raises for files that are no configurations: some of it unawares, as for `defaults: [null]`.
UNCOMPOSABLE = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError, AttributeError,
    AssertionError, RecursionError,
)  # fmt: skip


class RecipeSearchPath(SearchPathPlugin):
    """Lets Hydra find `recipe=NAME` in the recipes' folder, which lies beside `conf/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("lora_lightning", f"file://{RECIPES}")


@functools.lru_cache(maxsize=8)
def config_loader(config_dir: str | None, searchpath: tuple[str, ...] = ()) -> ConfigLoaderImpl:
    """Hydra's own loader over the same folders that the run will use.

    Args:
        config_dir: of the flag --config-dir.
        searchpath: of the option hydra.searchpath.
    """
    version.setbase(VERSION_BASE)
    setup_globals()
    Plugins.instance().register(RecipeSearchPath)
    search_path = create_config_search_path(str(CONF))
    if config_dir:
        folder = f"file://{Path(config_dir).absolute()}"
        search_path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
    for path in searchpath:
        search_path.prepend("hydra.searchpath", path, SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


@functools.lru_cache(maxsize=512)
def choices_of(loader: ConfigLoaderImpl, group: str) -> tuple[str, ...]:
    """The names that a group's folder holds; none for what is no group."""
    return tuple(sorted(loader.get_group_options(group, ObjectType.CONFIG)))


@functools.lru_cache(maxsize=512)
def compose(loader: ConfigLoaderImpl, groups: tuple[str, ...]) -> DictConfig | str:
    """The configuration of these group choices, or why there is none."""
    try:
        return loader.load_configuration(CONFIG_NAME, list(groups), run_mode=RunMode.RUN)
    except UNCOMPOSABLE as error:
        cause = error.__cause__ or error
        return " ".join((str(error) or str(cause)).split())[:400]


def recipe_config(recipe: str) -> dict[str, Any]:
    """The configuration of a recipe as plain values, without Hydra's own.

    Raises:
        ConfigError: there is no such recipe.
    """
    loader = config_loader(None)
    names = choices_of(loader, "recipe")
    if recipe not in names:
        near = did_you_mean(recipe, names)
        raise ConfigError([f"recipe={recipe}: there is no such recipe.{near} Recipes: {', '.join(names)}."])
    config = compose(loader, (f"recipe={recipe}",))
    if isinstance(config, str):
        raise ConfigError([f"recipe={recipe}: {config}"])
    return plain_values(config)


def plain_values(config: DictConfig) -> dict[str, Any]:
    """What a run's configuration holds, without Hydra's own part."""
    config = config.copy()
    with open_dict(config):
        config.pop("hydra")
        config.run_dir = "."
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
