"""Where a `_target_` of the user's own is found: in the current folder and beside the recipe."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from hydra.conf import ConfigSourceInfo

from lora_lightning.app.compose import CONF, RECIPES
from lora_lightning.app.recipe_file import RecipeFile


def find_user_modules(sources: Iterable[ConfigSourceInfo]) -> None:
    """Let `_target_: photos.Photos` mean photos.py in the current folder, in a folder of configurations that
    the user has named, or in `recipe/` there, or beside a recipe that is named by its file.

    They come last, so that no file there takes the place of what is installed.

    Args:
        sources: Hydra's search path, as it tells it in `hydra.runtime.config_sources`.
    """
    folders = [Path.cwd()]
    for source in sources:
        if source.schema == "file":
            folder = Path(source.path).absolute()
            folders += [] if folder in (CONF, RECIPES) else [folder, folder / "recipe"]
        elif source.schema == RecipeFile.scheme():
            folders.append(Path(source.path).parent)
    for folder in folders:
        if folder.is_dir() and str(folder) not in sys.path:
            sys.path.append(str(folder))
    importlib.invalidate_caches()


def import_remedy(target: str) -> str:
    """What to do about a target that cannot be imported; a module of that name may hide a file of the "
    "user's."""
    name = target.partition(".")[0]
    found = getattr(sys.modules.get(name), "__file__", None)
    own = Path.cwd() / f"{name}.py"
    if found and own.is_file() and not own.samefile(found):
        return f" {own.name} of this folder is hidden by {found}: give it another name."
    return " Install its package, or give a name that it has."
