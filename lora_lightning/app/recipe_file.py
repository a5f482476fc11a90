"""`recipe=my.yaml`: a recipe that is a file of the user's, found by Hydra as the choice `my` of the group."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from lora_lightning.errors import AdapterFileError, nearest
from lora_lightning.utils.mapping_file import read_mapping

GROUP, SUFFIX = "recipe", ".yaml"
WORD = f"{GROUP}="


class RecipeFile(ConfigSource):
    """A place of Hydra's search path that holds one recipe: `one-recipe:///home/me/my.yaml`."""

    @staticmethod
    def scheme() -> str:
        return "one-recipe"

    @classmethod
    def place(cls, file: Path) -> str:
        """How the search path names a file."""
        return f"{cls.scheme()}://{file.absolute()}"

    def load_config(self, config_path: str) -> ConfigResult:
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {config_path}")
        text = Path(self.path).read_text(encoding="utf-8")
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create(text),
            header=self._get_header_dict(text),
        )

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", GROUP)

    def is_config(self, config_path: str) -> bool:
        return config_path.removesuffix(SUFFIX) == f"{GROUP}/{Path(self.path).stem}"

    def available(self) -> bool:
        return Path(self.path).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == GROUP and results_filter != ObjectType.GROUP:
            return [Path(self.path).stem]
        return [GROUP] if config_path == "" and results_filter != ObjectType.CONFIG else []


def named_file(words: Sequence[str], problems: list[str]) -> tuple[Path | None, list[str]]:
    """The file that `recipe=my.yaml` names among a command line's words, which then say `recipe=my`.

    Args:
        problems: takes a line where there is no such file.
    """
    file, found = None, []
    for word in words:
        if not is_file_word(word):
            found.append(word)
            continue
        path = Path(word.removeprefix(WORD)).expanduser()
        if problem := _problem(path):
            problems.append(f"{word}: {problem}")
            continue
        file = path
        found.append(f"{WORD}{path.stem}")
    return file, found


def is_file_word(word: str) -> bool:
    """Whether a word of the command line names a recipe by its file."""
    return word.startswith(WORD) and word.endswith((SUFFIX, ".yml"))


def name_problem(path: Path) -> str:
    """Why a file cannot be named as a recipe, if it cannot."""
    if path.suffix != SUFFIX:
        return f"is no recipe's file: give one that ends in {SUFFIX}."
    if not path.stem.replace("-", "_").isidentifier():
        return "is a name that Hydra cannot read: give the file one of letters, digits, _ and -."
    return ""


def _problem(path: Path) -> str:
    if problem := name_problem(path):
        return problem
    if not path.is_file():
        near = nearest(path.stem, [p.stem for p in path.parent.glob(f"*{SUFFIX}")])
        meant = " or ".join(repr(f"{name}{SUFFIX}") for name in near)
        return f"there is no such file.{meant and f' Did you mean {meant}?'} Give one that there is."
    with contextlib.suppress(AdapterFileError):  # what is wrong in a file is told when it is composed
        if path.stem in (read_mapping(path, "").get("defaults") or ()):
            return "begins with itself; give the file another name than the recipe that it begins with."
    return ""
