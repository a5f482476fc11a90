"""`lora-lightning recipes`: the recipes that can be run, by task, a line each. Without Hydra and torch."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.app.recipe_text import begun_with, choices, description, is_recipe
from lora_lightning.errors import AdapterFileError
from lora_lightning.utils.mapping_file import read_text
from lora_lightning.utils.tables import printable

TITLES = {  # by the choice of the group `task`
    "classification": "Classification of pictures",
    "segmentation": "Segmentation of pictures",
    "detection": "Objects in pictures",
    "ctc": "Speech",
    "seq2seq": "Speech",
    "transducer": "Speech",
}
OWN = "Yours"
LEAST, MOST = 80, 120  # columns
END = """Run one:             lora-lightning train recipe=NAME
All its options:     lora-lightning train recipe=NAME --help
One of your own:     lora-lightning copy NAME my.yaml"""


def listed(home: Path, config_dir: Path | None = None) -> str:
    """A page: every recipe by its task, with its description.

    Args:
        home: the folder of the package's `conf/` and `recipes/`.
        config_dir: a folder of the user's with a folder `recipe/` in it; None looks into the current one.
    """
    found: dict[str, list[tuple[str, str]]] = {title: [] for title in (*TITLES.values(), OWN)}
    main = _chosen([home / "conf" / "train.yaml"])
    for file in sorted((home / "recipes" / "recipe").glob("*.yaml"), key=_rank):
        task = (main | _chosen(begun_with(file))).get("task", "")
        found.setdefault(TITLES.get(task, task), []).append((file.stem, _about(file)))
    found[OWN] = [(word, _about(file)) for word, file in _own(config_dir)]
    columns = min(max(shutil.get_terminal_size((MOST, 24)).columns, LEAST), MOST)
    width = max(len(name) for rows in found.values() for name, _ in rows)
    lines = []
    for title, rows in found.items():
        if rows:
            lines += [title, *(_line(name, about, width, columns) for name, about in rows), ""]
    return printable("\n".join([*lines, END]))


def _line(name: str, about: str, width: int, columns: int) -> str:
    return f"  {name:<{width}}  {textwrap.shorten(about, columns - width - 4, placeholder=' …')}".rstrip()


def _rank(file: Path) -> tuple[bool, str]:
    """By name; what makes the bases of others comes last."""
    return file.stem.startswith("pretrain_"), file.stem


def _own(config_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """The user's recipes, and how each is named on the command line."""
    folder = config_dir or Path()
    flag = f"--config-dir {folder} " if (folder / "recipe").is_dir() else ""
    for file in sorted(folder.glob("recipe/*.yaml")):
        yield f"{flag}recipe={file.stem}", file
    for file in sorted(folder.glob("*.yaml")):
        if is_recipe(file):
            yield f"recipe={file}", file


def _about(file: Path) -> str:
    try:
        return description(read_text(file, ""))
    except AdapterFileError as error:
        return f"cannot be read: {' '.join(str(error).split())}"


def _chosen(files: list[Path]) -> dict[str, str]:
    try:
        return choices(files)
    except AdapterFileError:
        return {}
