"""What each command is told, declared once: for its parser, its help page and its completion."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_lightning.app import arguments_of_files as of_files
from lora_lightning.app import arguments_of_use as of_use
from lora_lightning.app.parser import Parser, switch
from lora_lightning.files.hubs.address import FORMS

SHELLS = ("bash", "zsh")
PATHS = f"""PATH is an adapter's folder (of PEFT, too), a Trainer's checkpoint, or an address on a hub:
{FORMS[0]}, {FORMS[1]}.
`lora-lightning COMMAND --help` lists what a command takes."""


@functools.cache
def parser_of(command: str) -> Parser:
    """The parser of one of COMMANDS."""
    declare, usage, about = COMMANDS[command]
    parser = Parser(
        prog=f"lora-lightning {command}",
        usage=f"lora-lightning {command} {usage}",
        description=f"{about[0].upper()}{about[1:]}.",
        add_help=command != "train",  # whose page is Hydra's
    )
    declare(parser)
    return parser


def page() -> str:
    """All commands, a line each."""
    lines = [f"  {f'{name} {usage}':<62}{about}" for name, (_, usage, about) in COMMANDS.items()]
    return "\n".join(["usage: lora-lightning COMMAND [WORD ...]", "", *lines, "", PATHS])


def _train(parser: Parser) -> None:
    """Hydra's flags, of which those that would unpickle a file or change what is composed are left out."""
    parser.add_argument("words", nargs="*")
    for names in (
        ("--help", "-h"), ("--hydra-help",), ("--version",), ("--resolve",), ("--run", "-r"),
        ("--multirun", "-m"), ("--shell-completion", "-sc"),
    ):  # fmt: skip
        parser.flag(*names, action="store_true")
    parser.flag("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.flag("--package", "-p")
    parser.flag("--config-dir", "-cd")
    kinds = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    parser.flag("--info", "-i", nargs="?", const="all", choices=kinds)


def _recipes(parser: Parser) -> None:
    parser.flag(
        "--config-dir", metavar="FOLDER", help="those in FOLDER/recipe too", default=argparse.SUPPRESS
    )


def _copy(parser: Parser) -> None:
    parser.add_argument("words", nargs="*", metavar="NAME FILE.yaml", help="a recipe, and the file to write")


def _report(parser: Parser) -> None:
    about = "the folder of a run, ended or not; several are set side by side"
    parser.add_argument("paths", nargs="*", metavar="RUN", help=about)
    parser.key("out", "FILE.html", "the file to write; of one run, its own report.html where it is left out")
    parser.key("overwrite", "true", "replace FILE.html", switch)


def _completion(parser: Parser) -> None:
    about = 'eval "$(lora-lightning completion bash)", once or in ~/.bashrc; zsh likewise'
    parser.add_argument("shell", nargs="*", metavar="|".join(SHELLS), help=about)


COMMANDS: dict[str, tuple[Callable[[Parser], None], str, str]] = {
    "train": (
        _train,
        "[recipe=NAME] [group=choice] [key=value]",
        "adapt a model",
    ),
    "recipes": (_recipes, "[--config-dir FOLDER]", "the recipes there are, a line each"),
    "copy": (_copy, "NAME FILE.yaml", "a recipe as a file of your own, to be changed"),
    "merge": (
        of_files.merge,
        "ckpt=PATH out=FILE.safetensors [key=value ...]",
        "plain weights, the adapter merged into them",
    ),
    "inspect": (of_files.inspect, "PATH [base=FILE.safetensors]", "what a file or folder of weights holds"),
    "shrink": (
        of_files.shrink,
        "adapter=PATH energy=0.99 out=FOLDER [...]",
        "an adapter made one of lower rank, without its base",
    ),
    "extract": (
        of_files.extract,
        "tuned=PATH energy=0.95 out=FOLDER [...]",
        "fine-tuned weights made an adapter of their base",
    ),
    "compress": (
        of_files.compress,
        "adapter=PATH parameters=0.5 out=FOLDER [...]",
        "an adapted model by smaller plain layers, tested before and after",
    ),
    "push": (
        of_files.push,
        "adapter=PATH to=ADDRESS [key=value ...]",
        "an adapter and its card to the Hugging Face hub or W&B",
    ),
    "transcribe": (
        of_use.transcribe,
        "AUDIO ... adapter=FOLDER [key=value ...]",
        "what is said in audio files and in folders",
    ),
    "predict": (
        of_use.predict,
        "images=FOLDER out=FILE adapter=PATH [...]",
        "what is in pictures: classes, numbers, objects or masks",
    ),
    "serve": (
        of_use.serve,
        "adapter=PATH | adapters=FOLDER [key=value ...]",
        "answers over HTTP, adapters by name",
    ),
    "evaluate": (
        of_use.evaluate,
        "adapter=PATH [data=NAME key=value ...]",
        "scores on the test data, or on others",
    ),
    "export": (
        of_use.export,
        "adapter=PATH format=onnx out=FOLDER [...]",
        "a file that other programs run, with script and card",
    ),
    "report": (_report, "RUN ... [out=FILE.html]", "the page of a run anew, or several runs side by side"),
    "completion": (_completion, "bash|zsh", "Tab completes groups, recipes and options"),
}


def at_home(words: Sequence[str]) -> list[str]:
    """`key=~/x` with the home folder written out: shells do so only where a word begins with `~`."""
    return [re.sub(r"=~(?=/|$)", f"={Path.home()}", word, count=1) for word in words]
