"""`lora-lightning copy`: a recipe as one file of the user's, with every option that it leaves as it is as a
comment. Loads no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.app.compose import CONF, RECIPES, shipped
from lora_lightning.app.options import OWN, RULES, options_in
from lora_lightning.app.recipe_file import SUFFIX, name_problem
from lora_lightning.app.recipe_text import Written, begun_with, choices, flow, header, written
from lora_lightning.app.static_docs import UNKNOWN, Option, documented
from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.utils.atomic import write_whole

SWEEP = "wandb_sweep"
LEFT_OUT = ("hydra", "logger", "run_dir", "ckpt_path")  # words of a command line rather than of a recipe
OF_FILES = (  # of the callbacks: how the application names and fills its files
    "filename", "save_weights_only", "save_last", "save_on_train_epoch_end", "auto_insert_metric_name",
    "enable_version_counter",
)  # fmt: skip
FIRST = ("data", "model", "task")  # sections
WIDTH, LEAST = 112, 16  # columns of a line, and of what is said behind a value
ABOUT = """\
A copy of recipe={name}, to be changed. Lines such as "# name: value" are options at the values that they
have without the line. To change one, take its "# " away, and that of the names above it that stand further
left."""


@dataclass
class Node:
    """An option or a section of a recipe: the recipe's own, or one that it leaves as it is."""

    own: bool = False
    text: str = ""
    above: Sequence[str] = ()
    beside: str = ""
    within: dict[str, Node] = field(default_factory=dict)


def copy_recipe(name: str, out: Path) -> list[str]:
    """Write a recipe into a file of the user's, which composes to the same; or the sweep of W&B.

    Args:
        name: the recipe, or "wandb_sweep".
        out: the file, which must not be there.

    Returns:
        What to do next, in lines.

    Raises:
        UserError: every mistake in one message; nothing is written.
    """
    known = (*shipped().choices("recipe"), SWEEP)
    problems = []
    if name not in known:
        near = did_you_mean(name, known)
        problems.append(f"{name}: there is no such recipe.{near} `lora-lightning recipes` lists them.")
    if problem := name_problem(out):
        problems.append(f"{out}: {problem}")
    elif out.exists():
        problems.append(f"{out} is there already: give another name; nothing is overwritten.")
    elif not out.parent.is_dir():
        problems.append(f"{out}: there is no folder {out.parent}: create it first.")
    if problems:
        raise UserError("\n".join(problems))
    sweep = CONF / f"{SWEEP}{SUFFIX}"
    text = sweep.read_text(encoding="utf-8") if name == SWEEP else recipe_text(name, str(out))
    write_whole(out, lambda file: Path(file).write_text(text, encoding="utf-8"))
    if name == SWEEP:
        return [f"{out}: a sweep of W&B. Change its command and parameters, then:", f"  wandb sweep {out}"]
    return [
        f"{out}: the recipe {name}, with its options and what they mean. Change it, then:",
        f"  lora-lightning train recipe={out}",
        f"Its runs go to outputs/{out.stem}/.",
    ]


def recipe_text(name: str, out: str) -> str:
    """The text of the copy: the recipe's own values stand as they are, all others as comments."""
    files = begun_with(RECIPES / "recipe" / f"{name}{SUFFIX}")
    config = shipped().compose_groups([f"recipe={name}"])
    if isinstance(config, str):  # of the package's own recipes none is so
        raise UserError(f"recipe={name}: {config}")
    root = Node(own=True)
    for file in files:
        _add_own(root, file.read_text(encoding="utf-8"))
    root.within.pop("defaults", None)
    chosen = choices(files)
    _add_others(root, config, _comments({**_first_choices(), **chosen}))
    lines = ["# @package _global_", *_header(files[-1], name, out), "defaults:"]
    lines += [f"  - override /{group}: {choice}" for group, choice in chosen.items()]
    return "\n".join([*lines, "", *_lines(root)]) + "\n"


def _header(file: Path, name: str, out: str) -> Iterator[str]:
    lines = header(file.read_text(encoding="utf-8"))
    for line in lines:
        command = line.replace(f" recipe={name}", f" recipe={out}")
        yield f"# {command.replace(f'outputs/{name}/', f'outputs/{Path(out).stem}/')}".rstrip()
    yield "#"
    yield from textwrap.wrap(
        ABOUT.format(name=name), WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )


def _add_own(root: Node, text: str) -> None:
    """The values of one recipe, which take the place of those of a recipe that it begins with."""
    for path, found in written(text).items():
        node = root
        for part in path[:-1]:
            node = node.within[part]
        before = node.within.get(path[-1], Node())
        within = {} if found.text else before.within
        node.within[path[-1]] = Node(
            True, found.text, found.above or before.above, found.beside or before.beside, within
        )


def _add_others(root: Node, config: DictConfig, comments: Mapping[tuple[str, ...], Written]) -> None:
    """What the recipe leaves as it is: the values of the groups that it chooses, and what else their classes
    take."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    for key in LEFT_OUT:
        plain.pop(key, None)
    _complete(root, plain, (), comments)
    for section, node in root.within.items():
        values = plain.get(section)
        if not isinstance(values, dict) or section == "trainer":  # of whose options RULES knows the useful
            continue
        target = values.get("_target_")
        about = _about_section(section, target)
        for name in options_in(section, target):
            found = about.get(name)
            if found and name not in node.within and found.default is not UNKNOWN:
                node.within[name] = Node(text=flow(_plain(found.default)))
            if found and name in node.within and not node.within[name].beside:
                node.within[name].beside = found.about.replace("None", "null")


def _complete(
    node: Node, values: Mapping[str, Any], path: tuple[str, ...], comments: Mapping[tuple[str, ...], Written]
) -> None:
    for key, value in values.items():
        here = (*path, str(key))
        if str(key).startswith("_") or _left_out(here, value):
            continue
        own = node.within.get(str(key))
        if own is None:
            beside = comments[here].beside if here in comments else ""
            own = node.within[str(key)] = Node(beside=beside)
            if not (isinstance(value, dict) and value):
                own.text = flow(value)
        if not own.text and isinstance(value, dict):
            _complete(own, value, here, comments)


def _about_section(section: str, target: Any) -> dict[str, Option]:
    if isinstance(target, str):
        return documented(target)
    return documented(OWN[section]) if section in OWN else {}


def _left_out(path: tuple[str, ...], value: Any) -> bool:
    """Where and how a run writes its files, which no recipe says, and what of the Trainer few know."""
    if path[0] == "callbacks":
        return path[-1] in OF_FILES or (isinstance(value, str) and "${run_dir}" in value)
    return path[0] == "trainer" and len(path) == 2 and ".".join(path) not in RULES


def _comments(chosen: Mapping[str, str]) -> dict[tuple[str, ...], Written]:
    """What the package's files say beside the values of the groups, by the values' paths."""
    found = written((CONF / "train.yaml").read_text(encoding="utf-8"))
    for group, choice in chosen.items():
        file = CONF / group / f"{choice}{SUFFIX}"
        if file.is_file():
            for one in begun_with(file):
                own = written(one.read_text(encoding="utf-8"))
                found |= {(*group.split("/"), *path): value for path, value in own.items()}
    return found


def _first_choices() -> dict[str, str]:
    """What is chosen of the groups where no recipe says."""
    return choices([CONF / "train.yaml"])


def _lines(node: Node, depth: int = 0, commented: int | None = None) -> Iterator[str]:
    """A section's options: its own first, as they are, then the others, as comments.

    Args:
        commented: how deep the outermost section stands that is a comment already; None where none is.
    """
    for key, one in sorted(node.within.items(), key=lambda item: (not item[1].own, item[0] not in FIRST)):
        if not (one.text or one.within):
            continue
        mark = commented if commented is not None else None if one.own else depth
        if depth == 0 and (one.above or (one.within and not one.own)):
            yield ""
        yield from (f"{'  ' * depth}# {line}" for line in one.above)
        left, inner = ("  " * depth, "") if mark is None else (f"{'  ' * mark}# ", "  " * (depth - mark))
        yield _with_about(f"{left}{inner}{key}: {one.text}".rstrip(), one.beside)
        yield from _lines(one, depth + 1, mark)


def _with_about(line: str, about: str) -> str:
    room = WIDTH - len(line) - 3
    if not about or room < LEAST:
        return line
    return f"{line} # {textwrap.shorten(about, room, placeholder=' …')}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
