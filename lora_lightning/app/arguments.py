"""What the commands beside `train` are told: options by name, usage, and their check, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_lightning.app.options import FLAG, SHARE, TEXT, Rule, choice, whole
from lora_lightning.errors import UserError, did_you_mean

ABOVE_ZERO = Rule("a number above 0", lambda v: 0 < v < math.inf)
FROM_ZERO = Rule("a number of at least 0", lambda v: 0 <= v < math.inf)
PATH = Rule("a file or folder", lambda v: Path(v).expanduser().exists())


class Option(NamedTuple):
    """One `key=value` of a command: the type of its value, and what it may be."""

    kind: type
    rule: Rule


TEXTUAL, SWITCH, EXISTING = Option(str, TEXT), Option(bool, FLAG), Option(str, PATH)
MERGE = {
    "ckpt": EXISTING, "out": TEXTUAL, "base": EXISTING, "adapter": TEXTUAL, "overwrite": SWITCH,
    "check_base": SWITCH,
}  # fmt: skip
INSPECT = {"base": EXISTING}
TRANSCRIBE = {
    "adapter": EXISTING, "recipe": TEXTUAL, "format": Option(str, choice("plain", "srt", "json")),
    "out": TEXTUAL, "device": TEXTUAL, "chunk": Option(float, ABOVE_ZERO),
    "overlap": Option(float, FROM_ZERO), "batch": Option(int, whole(1)),
    "beam": Option(int, whole(1)), "lm": EXISTING, "lexicon": EXISTING, "check_base": SWITCH,
}  # fmt: skip
PREDICT = {
    "images": EXISTING, "out": TEXTUAL, "adapter": EXISTING, "ckpt": EXISTING,
    "batch_size": Option(int, whole(1)), "num_workers": Option(int, whole(0)), "score": Option(float, SHARE),
    "overwrite": SWITCH, "check_base": SWITCH,
}  # fmt: skip
OPTIONS = {"merge": MERGE, "inspect": INSPECT, "transcribe": TRANSCRIBE, "predict": PREDICT}

USAGE = {
    "train": """\
lora-lightning train [recipe=NAME] [group=choice] [key=value]   adapt a model; train --help lists all""",
    "merge": """\
lora-lightning merge ckpt=PATH out=FILE.safetensors             plain weights, the adapter merged into them
    base=FILE.safetensors   the base's weights, where the run of PATH cannot tell them
    adapter=NAME            which one of a checkpoint that holds several
    overwrite=true          replace FILE
    check_base=false         accept other base weights than those that it was trained on""",
    "inspect": """\
lora-lightning inspect PATH [base=FILE.safetensors]             what a file or folder of weights holds""",
    "transcribe": """\
lora-lightning transcribe AUDIO... adapter=FOLDER               what is said in audio files and in folders
    recipe=NAME             builds the model; without adapter=, its base alone is used
    format=plain|srt|json   text, subtitles, or everything with the time of each word
    out=FILE or FOLDER      instead of the screen
    device=cuda             chunk=20 overlap=4 seconds, batch=4 chunks at once
    beam=32 lm=FILE.arpa lexicon=FILE   beam search with a language model or a list of words
    check_base=false         accept other base weights than those that it was trained on""",
    "predict": """\
lora-lightning predict images=FOLDER out=FOLDER adapter=FOLDER  what a detector finds: JSON and pictures
    ckpt=FILE               a Trainer's checkpoint in place of the adapter's folder
    recipe=NAME [key=value] builds the model; without adapter= and ckpt=, its base alone is used
    score=0.5               least score of what pictures show; batch_size=8 num_workers=4 overwrite=true
    check_base=false         accept other base weights than those that it was trained on""",
    "completion": """\
lora-lightning completion bash|zsh                              Tab completes groups, recipes and options
    eval "$(lora-lightning completion bash)"                    once, or in ~/.bashrc; zsh likewise""",
}
PATHS = "PATH is an adapter's folder (of PEFT, too) or a Trainer's checkpoint."


def at_home(words: Sequence[str]) -> list[str]:
    """`key=~/x` with the home folder written out: shells do so only where a word begins with `~`."""
    return [re.sub(r"=~(?=/|$)", f"={Path.home()}", word, count=1) for word in words]


def usage(command: str | None = None) -> str:
    """How one command is called, or all of them."""
    if command is None:
        return "\n".join([*USAGE.values(), "", PATHS])
    return f"{USAGE[command]}\n\n{PATHS}" if "PATH" in USAGE[command] else USAGE[command]


def transcribe_problems(given: Mapping[str, Any]) -> list[str]:
    """What is wrong in options of `transcribe` taken together; None stands for what was malformed."""
    problems = []
    if not {"adapter", "recipe"} & given.keys():
        problems.append("give adapter=FOLDER, or recipe=NAME for its base.")
    chunk, overlap = given.get("chunk", 20.0), given.get("overlap", 4.0)
    if None not in (chunk, overlap) and not 0 <= overlap <= chunk / 2:
        problems.append(f"overlap={overlap:g}: give seconds from 0 to half of chunk={chunk:g}.")
    return problems


def parsed(
    words: Sequence[str],
    options: Mapping[str, Option],
    problems: Sequence[str] = (),
    together: Callable[[Mapping[str, Any]], list[str]] | None = None,
) -> dict[str, Any]:
    """`key=value` words as options.

    Args:
        problems: what is wrong besides, to be told with it.
        together: tells what is wrong in the options taken together.

    Raises:
        UserError: every unknown, repeated, malformed or forbidden word, in one message.
    """
    given: dict[str, Any] = {}
    found = list(problems)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in options:
            near = did_you_mean(name.lstrip("-"), options)
            found.append(f"{word}: there is no such option.{near} Options: {', '.join(options)}.")
        elif not equals or not value:
            found.append(f"{word}: give {name}=VALUE.")
        elif name in given:
            found.append(f"{word}: {name} is given twice.")
        else:
            given[name] = _read(word, value, options[name], found)
    found += together(given) if together else []
    if found:
        raise UserError("\n".join(found))
    return given


def missing_path(path: str) -> str:
    """`there is no such file or folder`, with what lies near by."""
    file = Path(path).expanduser()
    folder = file.parent if file.parent.is_dir() else Path()
    near = did_you_mean(file.name, [p.name for p in folder.iterdir()])
    return f"{path}: there is no such file or folder.{near}"


def _read(word: str, value: str, option: Option, problems: list[str]) -> Any:
    name = word.partition("=")[0]
    read: Any = {"true": True, "false": False}.get(value, value) if option.kind is bool else value
    if option.kind in (int, float):
        try:
            read = option.kind(value)
        except ValueError:
            problems.append(f"{word}: give {option.rule.allowed}.")
            return None
    if option.rule is PATH and not PATH.test(read):
        problems.append(f"{name}={missing_path(value)}")
    elif not option.rule.test(read):
        near = did_you_mean(value, option.rule.names or (("true", "false") if option.kind is bool else ()))
        problems.append(f"{word}: give {option.rule.allowed}.{near}")
    return read
