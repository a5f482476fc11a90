"""Tab completion in bash and zsh: the script for the shell, and the words for a line, without Hydra."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.app.arguments import COMMANDS, SHELLS, parser_of
from lora_lightning.app.options import RULES, options_in
from lora_lightning.errors import AdapterFileError
from lora_lightning.utils.mapping_file import parse_values, read_text
from lora_lightning.utils.marks import Check

PROGRAM, SCRIPT = "lora-lightning", "train.py"
FLAGS = ("--help", "--multirun", "--cfg", "--resolve", "--config-dir", "--hydra-help")
PACKAGE = Path(__file__).parents[1]
OF_A_RUN = {
    "predict": ("recipe=", "model."),
    "export": ("recipe=", "model."),
    "evaluate": ("recipe=", "data=", "data.", "model."),
    "extract": ("recipe=", "model=", "model."),
}
OPEN = ("=", ".", "/")  # after these a word goes on

BASH = """\
_lora_lightning() {
    local IFS=$'\\n'
    [[ ${COMP_WORDS[0]##*/} == python* && ${COMP_WORDS[1]##*/} != train.py ]] && return
    COMPREPLY=($(PYTHON -I -m lora_lightning.app.completion bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
}
complete -o bashdefault -o default -F _lora_lightning lora-lightning python python3
"""
ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_lora_lightning() {
    if [[ ${words[1]:t} == python* && ${words[2]:t} != train.py ]]; then
        autoload -Uz +X _python 2>/dev/null && _python "$@" || _files
        return
    fi
    local -a found line=("${(@)words[1,CURRENT]}")
    found=(${(f)"$(PYTHON -I -m lora_lightning.app.completion zsh "${line[@]}" 2>/dev/null)"})
    (( $#found )) || { _files; return }
    compadd -S '' -- ${(M)found:#*[=./]}
    compadd -- ${found:#*[=./]}
}
compdef _lora_lightning lora-lightning python python3
"""


def script(shell: str) -> str:
    """What `eval "$(lora-lightning completion SHELL)"` evaluates; this interpreter answers ever after."""
    text = {"bash": BASH, "zsh": ZSH}[shell]
    return text.replace("PYTHON", shlex.quote(sys.executable))


def complete(words: Sequence[str]) -> list[str]:
    """What the last of a line's words may become; nothing where the shell's own files are meant.

    Args:
        words: from the program on: `python train.py …` or `lora-lightning …`.
    """
    at = next((i for i, w in enumerate(words[:-1]) if w.rpartition("/")[2] in (PROGRAM, SCRIPT)), None)
    if at is None:
        return []
    home = home_of(Path(words[at]))
    *before, current = words[at + 1 :]
    if words[at].endswith(PROGRAM):
        if not before:
            found: list[str] = [*COMMANDS, "--help"]
        elif before[0] == "train":
            found = _of_train(home, before[1:], current)
        elif before[0] == "completion":
            found = list(SHELLS)
        elif before[0] == "recipes":
            found = ["--config-dir"]
        elif before[0] == "copy" and len(before) == 1:
            found = _choices([home / "recipes"], "recipe")
        elif before[0] in COMMANDS:
            found = [f"{name}=" for name in parser_of(before[0]).keys]
            if before[0] in OF_A_RUN:  # their other words are those of train
                found += [
                    w for w in _of_train(home, before[1:], current) if w.startswith(OF_A_RUN[before[0]])
                ]
        else:
            found = []
    else:
        found = _of_train(home, before, current)
    return sorted({word for word in found if word.startswith(current)})


def home_of(program: Path = Path(PROGRAM)) -> Path:
    """The folder of conf/ and recipes/: beside train.py, beside the package, or in it when installed."""
    beside = program.expanduser().absolute().parent
    places = [beside] if program.name == SCRIPT else []
    return next(
        (p for p in (*places, PACKAGE, PACKAGE.parent) if (p / "conf" / "train.yaml").is_file()), PACKAGE
    )


def _of_train(home: Path, before: Sequence[str], current: str) -> list[str]:
    roots = [home / "conf", home / "recipes", *_config_dirs(before)]
    if before and before[-1] == "--config-dir":
        return []
    if current.startswith("-"):
        return list(FLAGS)
    key, equals, _ = current.partition("=")
    groups = sorted({_group(root, folder) for root in roots for folder in _folders(root)})
    if equals and key in groups:
        return [f"{key}={name}" for name in _choices(roots, key)]
    values = _kept(_values(roots, before))
    declared = _declared(values, key)
    if equals:
        check = RULES.get(key) or declared.get(key)
        return [f"{key}={name}" for name in (check.names if check else ())]
    options = {name for name in values if not name.rpartition(".")[2].startswith("_")} | declared.keys()
    if "." not in current:
        sections = {f"{option.partition('.')[0]}." for option in options if "." in option}
        return [*(f"{g}=" for g in groups), *sections, *(f"{o}=" for o in options if "." not in o), "resume="]
    return [f"{option}=" for option in options]


def _declared(values: Mapping[str, Any], key: str) -> dict[str, Check | None]:
    """What the classes of the sections on the way to this key take, set in a file or not."""
    found: dict[str, Check | None] = {}
    for section in itertools.accumulate(key.split(".")[:-1], lambda a, b: f"{a}.{b}"):
        own = options_in(section, values.get(f"{section}._target_"))
        found |= {f"{section}.{name}": check for name, check in own.items()}
    return found


def _kept(options: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    """Without those that a later one has replaced: by a value, or by a mapping."""
    kept: dict[str, Any] = {}
    for option, value in options:
        parents = itertools.accumulate(option.split(".")[:-1], lambda a, b: f"{a}.{b}")
        replaced = [k for k in kept if k.startswith(f"{option}.")]
        for name in (*parents, *replaced):
            kept.pop(name, None)
        kept[option] = value
    return kept


def _config_dirs(words: Sequence[str]) -> list[Path]:
    given = [w.partition("=")[2] for w in words if w.startswith("--config-dir=")]
    given += [value for flag, value in itertools.pairwise(words) if flag in ("--config-dir", "-cd")]
    return [Path(value).expanduser() for value in given]


def _folders(root: Path) -> Iterator[Path]:
    for folder in root.glob("*/"):
        if folder.is_dir():
            inner = [f for f in folder.glob("*/") if f.is_dir()]
            yield from inner if folder.name == "hydra" else [folder, *inner]


def _group(root: Path, folder: Path) -> str:
    return folder.relative_to(root).as_posix()


def _choices(roots: Sequence[Path], group: str) -> list[str]:
    return [file.stem for root in roots for file in root.glob(f"{group}/*.yaml")]


def _values(roots: Sequence[Path], words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The options, with their values, under the choices that a line has made so far."""
    main = _read(roots[0] / "train.yaml")[0]
    chosen = {k: str(v) for d in main.pop("defaults", []) if isinstance(d, dict) for k, v in d.items()}
    given = dict(word.split("=", 1) for word in words if "=" in word)
    chosen.update({group: given[group] for group in chosen if group in given})
    recipes = list(_inherited(roots, "recipe", chosen.get("recipe", "")))
    for content, _ in reversed(recipes):
        for default in content.get("defaults") or []:
            for key, value in default.items() if isinstance(default, dict) else ():
                group = key.removeprefix("override").strip().lstrip("/")
                if group not in given:
                    chosen[group] = str(value)
    yield from _leaves(main, "")
    for group, name in chosen.items():
        found = [file for one in _names(name) for file in reversed(list(_inherited(roots, group, one)))]
        for content, everywhere in found:
            yield from _nested(roots, group, content, {**chosen, **given})
            inner = {k: v for k, v in content.items() if k not in ("defaults", "hydra")}
            yield from _leaves(inner, "" if everywhere or group == "recipe" else group)


def _names(choice: str) -> list[str]:
    """One name, or those of a list."""
    return [name.strip(" '\"") for name in choice.strip("[]").split(",")]


def _nested(
    roots: Sequence[Path], group: str, content: Mapping[str, Any], chosen: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """The options of the groups within a group that its file chooses from, such as data/augment."""
    for default in content.get("defaults") or []:
        for key, name in default.items() if isinstance(default, dict) else ():
            within = f"{group}/{key}"
            for inner, _ in reversed(list(_inherited(roots, within, str(chosen.get(within, name))))):
                yield from _leaves(
                    {k: v for k, v in inner.items() if k != "defaults"}, within.replace("/", ".")
                )


def _inherited(
    roots: Sequence[Path], group: str, name: str, depth: int = 8
) -> Iterator[tuple[dict[str, Any], bool]]:
    """A choice's file and those of its group that it begins with; whether each stands at the top."""
    places = [root / group / f"{name}.yaml" for root in roots]
    if group == "recipe" and name.endswith(".yaml"):  # a file that is named itself
        places = [Path(name).expanduser()]
    file = next((place for place in places if place.is_file()), None)
    if file is None or not depth or group == "hydra":
        return
    content, everywhere = _read(file)
    yield content, everywhere
    for default in content.get("defaults") or []:
        if isinstance(default, str) and default != "_self_":
            yield from _inherited(roots, group, default, depth - 1)


def _read(file: Path) -> tuple[dict[str, Any], bool]:
    try:
        text = read_text(file, "")
        content = parse_values(text, file, "")
    except AdapterFileError:
        return {}, False
    everywhere = re.match(r"#\s*@package\s+_global_", text) is not None
    return (content if isinstance(content, dict) else {}), everywhere


def _leaves(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            yield from _leaves(value, here)
        else:
            yield here, value


def main(shell: str, *line: str) -> None:
    """Print the words for a line: of bash its text up to the cursor, of zsh its words."""
    words = list(line) if shell == "zsh" else re.split(r"\s+", line[0].lstrip())
    for word in complete(words):
        # bash replaces what stands after the last "=".
        print(word.rpartition("=")[2] if shell == "bash" and "=" in words[-1] else word)


if __name__ == "__main__":
    main(*sys.argv[1:])
