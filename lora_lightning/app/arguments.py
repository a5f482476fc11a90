"""What each command is told, declared once: for its parser, its help page and its completion."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_lightning.app.parser import Parser, existing, found_or_address, some, switch, value_of
from lora_lightning.exporting.formats import FORMATS
from lora_lightning.files.hubs.address import FORMS, address_problem
from lora_lightning.utils.marks import (
    Check,
    above,
    at_least,
    between,
    matching,
    number,
    one_of,
    whole,
)

SHELLS = ("bash", "zsh")
DEVICES = ("auto", "cpu", "cuda", "mps")
_PORT = Check("0, or a port from 1024 to 65535", lambda v: v == 0 or 1024 <= v <= 65535)
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


def _merge(parser: Parser) -> None:
    parser.key(
        "ckpt", "PATH", "an adapter's folder (of PEFT, too) or a Trainer's checkpoint", found_or_address, True
    )
    parser.key("out", "FILE.safetensors", "the file to write", needed=True)
    parser.key(
        "base",
        "FILE.safetensors",
        "the base's weights, where the run of PATH cannot tell them",
        found_or_address,
    )
    parser.key("adapter", "NAME", "which one of a checkpoint that holds several")
    parser.key("overwrite", "true", "replace FILE", switch)
    _check_base(parser)


def _inspect(parser: Parser) -> None:
    about = "an adapter's folder (of PEFT, too), a Trainer's checkpoint or a file that merge wrote"
    parser.add_argument("paths", nargs="*", metavar="PATH", help=about)
    parser.key(
        "base", "FILE.safetensors", "the base's weights, to which changes are compared", found_or_address
    )


def _shrink(parser: Parser) -> None:
    parser.key(
        "adapter",
        "PATH",
        "the adapter's folder or address, the run's, or a Trainer's checkpoint",
        found_or_address,
        True,
    )
    parser.key("out", "FOLDER", "the folder to write", needed=True)
    _rank_and_energy(parser)
    parser.key("budget", "100000", "parameters of all updates, for the least that is lost", some)
    parser.key("overwrite", "true", "write into a folder that is not empty", switch)


def _extract(parser: Parser) -> None:
    about = "builds the base, where no run of the tuned weights says how"
    parser.add_argument("words", nargs="*", metavar="recipe=NAME [key=value ...]", help=about)
    parser.key(
        "tuned", "PATH", "the fine-tuned weights: a file, a folder, or the run's", found_or_address, True
    )
    parser.key("out", "FOLDER", "the folder to write", needed=True)
    parser.key(
        "base", "PATH", "the weights that were tuned, where they are not the model's own", found_or_address
    )
    _rank_and_energy(parser)
    form = value_of(str, one_of("lora_lightning", "peft"))
    parser.key("format", "peft", "of the files: lora_lightning or peft", form)
    parser.key("overwrite", "true", "write into a folder that is not empty", switch)


def _rank_and_energy(parser: Parser) -> None:
    parser.key("rank", "8", "the highest rank of each layer", some)
    share = value_of(float, number(above(0, most=1)))
    parser.key("energy", "0.95", "or: the part of each layer's energy (sum of squares) to keep", share)


def _compress(parser: Parser) -> None:
    about = "builds the model; without adapter=, its base alone is compressed"
    parser.add_argument("words", nargs="*", metavar="recipe=NAME [key=value ...]", help=about)
    parser.key(
        "adapter",
        "PATH",
        "the adapter's folder or address, model.safetensors, or the run's folder",
        found_or_address,
    )
    parser.key("out", "FOLDER", "the folder to write", needed=True)
    share = value_of(float, number(above(0, below=1)))
    parser.key("parameters", "0.5", "the share of the parameters that stays, at most", share)
    parser.key("flops", "0.5", "or: of the FLOPs of linear layers and convolutions", share)
    parser.key("latency", "0.5", "or: of their time on this machine, in the first batch", share)
    parser.key("energy", "0.95", "or: of each layer's output, with the fewest parameters that keep it", share)
    parser.key("batches", "8", "of the training data, by which it is chosen", some)
    parser.key("overwrite", "true", "write into a folder that is not empty", switch)
    _check_base(parser)


def _push(parser: Parser) -> None:
    about = "the adapter's folder, the run's, or a Trainer's checkpoint"
    parser.key("adapter", "PATH", about, found_or_address, True)
    parser.key("to", "ADDRESS", f"where it goes: {' or '.join(FORMS)}", _address, True)
    parser.key("private", "false", "on the Hugging Face hub: let everybody see a new repository", switch)
    about = "of the adapter, as the hub spells it, for its card"
    parser.key("license", "apache-2.0", about, value_of(str, matching(r"[a-z0-9][a-z0-9.-]*", "a licence")))
    parser.key("base", "true", "with the base's weights, where these are random ones", switch)
    parser.key("overwrite", "true", "replace a card that is there already", switch)
    parser.key("dry", "true", "show what would be uploaded, and upload nothing", switch)


def _address(text: str) -> str:
    """An address on a hub."""
    if problem := address_problem(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def _transcribe(parser: Parser) -> None:
    parser.add_argument("paths", nargs="*", metavar="AUDIO", help="audio files, and folders of them")
    parser.key("adapter", "FOLDER", "the adapter", found_or_address)
    parser.key("recipe", "NAME", "builds the model; without adapter=, its base alone is used")
    form = value_of(str, one_of("plain", "srt", "json"))
    parser.key("format", "plain|srt|json", "text, subtitles, or everything with the time of each word", form)
    parser.key("out", "FILE", "a file, or a folder, instead of the screen")
    parser.key("device", "cuda", "where the model runs")
    parser.key("chunk", "20", "seconds that are heard at once", value_of(float, number(above(0))))
    parser.key("overlap", "4", "seconds that two chunks share", value_of(float, number(at_least(0))))
    parser.key("batch", "4", "chunks at once", some)
    parser.key("beam", "32", "beams of a beam search", some)
    parser.key("lm", "FILE.arpa", "a language model for it", existing)
    parser.key("lexicon", "FILE", "a list of words for it", existing)
    _check_base(parser)


def _predict(parser: Parser) -> None:
    about = "builds the model; without adapter= and ckpt=, its base alone is used"
    parser.add_argument("words", nargs="*", metavar="recipe=NAME [key=value ...]", help=about)
    share = value_of(float, number(between(0, 1)))
    parser.key("images", "FOLDER|FILE", "the pictures", existing)
    parser.key(
        "out",
        "FILE|FOLDER",
        "of classes a .csv, .json or .parquet; of objects or masks a folder",
        needed=True,
    )
    parser.key(
        "adapter",
        "PATH",
        "the adapter's folder or address, model.safetensors, or the run's folder",
        found_or_address,
    )
    parser.key("ckpt", "FILE", "a Trainer's checkpoint in place of these", existing)
    parser.key("top", "5", "of classes: how many of them, the likeliest first", some)
    parser.key("threshold", "0.5", "of pictures of several classes: the least probability of one", share)
    parser.key("sheet", "FILE.png", "of classes: the pictures with their classes in one picture, too")
    parser.key(
        "flips", "true", "of classes or masks: averaged over each picture and its mirror image", switch
    )
    parser.key("score", "0.5", "of a detector: least score of what pictures show", share)
    parser.key("batch_size", "8", "images at once", some)
    parser.key("num_workers", "4", "processes that read images", value_of(int, whole(at_least(0))))
    parser.key("overwrite", "true", "write into a folder that is not empty", switch)
    _check_base(parser)


def _serve(parser: Parser) -> None:
    about = "builds the base, where no adapter's run says how"
    parser.add_argument("words", nargs="*", metavar="recipe=NAME [key=value ...]", help=about)
    parser.key("adapter", "RUN/adapter", "the one adapter: its folder, or the run's", existing)
    parser.key("adapters", "FOLDER", "or: adapters by name, its sub-folders, found while it runs", existing)
    parser.key("base", "PATH", "a run's adapter or model.safetensors, which says the base", found_or_address)
    parser.key("port", "8000", "0 takes a free one", value_of(int, _PORT))
    hosts = value_of(str, one_of("127.0.0.1", "0.0.0.0", "::"))
    parser.key("host", "0.0.0.0", "who may connect: 127.0.0.1, this machine alone, is the default", hosts)
    parser.key("device", "auto|cpu|cuda|mps", "where the model runs", value_of(str, one_of(*DEVICES)))
    parser.key("workers", "1", "processes with the model, on each device", some)
    parser.key("threads", "2", "of torch in each worker", some)
    parser.key("batch", "8", "pictures, or parts of sounds, that run together", some)
    wait = value_of(float, number(between(0, 10_000)))
    parser.key("max_wait_ms", "5", "how long one waits for others to share its batch", wait)
    parser.key("most", "256", "adapters kept in memory", some)
    parser.key("pinned", "NAME,NAME", "of these, those that are read at once and never leave", _names)
    parser.key("queue", "64", "requests at once; further ones are told to come again", some)
    seconds = value_of(float, number(above(0)))
    parser.key("timeout", "60", "seconds for an answer", seconds)
    parser.key("max_mb", "32", "megabytes of an upload", some)
    parser.key("pixels", "50000000", "pixels of a picture", some)
    parser.key("seconds", "600", "seconds of a sound", seconds)
    _check_base(parser)


def _names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name for name in text.split(",") if name]


def _evaluate(parser: Parser) -> None:
    about = "other data than the run's: data=NAME data.key=value; or recipe=NAME, which builds the model"
    parser.add_argument("words", nargs="*", metavar="[data=NAME key=value ...]", help=about)
    parser.key(
        "adapter",
        "PATH",
        "the adapter's folder or address, model.safetensors, or the run's folder",
        found_or_address,
    )
    parser.key("ckpt", "FILE", "a Trainer's checkpoint in place of these", existing)
    parser.key("out", "FILE.json", "every score, for programs")
    parser.key("report", "FOLDER", "where the task's own page of it goes")
    parser.key("overwrite", "true", "replace FILE.json", switch)
    _check_base(parser)


def _export(parser: Parser) -> None:
    about = "builds the model; without adapter= and ckpt=, its base alone is exported"
    parser.add_argument("words", nargs="*", metavar="recipe=NAME [key=value ...]", help=about)
    parser.key(
        "adapter",
        "PATH",
        "the adapter's folder or address, model.safetensors, or the run's folder",
        found_or_address,
    )
    parser.key("ckpt", "FILE", "a Trainer's checkpoint in place of these", existing)
    form = value_of(str, one_of(*FORMATS))
    parser.key("format", "|".join(FORMATS), "of the file; onnx where it is left out", form)
    parser.key("out", "FOLDER", "the folder to write", needed=True)
    sizes = value_of(str, one_of("batch", "size", "time", "single"))
    parser.key(
        "axes", "size", "what is of any size: batch; of pictures size, too; of sound time; single", sizes
    )
    parser.key("bytes", "true", "of pictures: bytes go in, and the file normalizes them", switch)
    int8 = value_of(str, one_of("dynamic", "static"))
    parser.key("quantize", "dynamic|static", "int8 of weights; or of all, by the run's training data", int8)
    parser.key("evaluate", "true", "test the file on the run's test data, beside the model", switch)
    parser.key("overwrite", "true", "replace an exported model in FOLDER", switch)
    _check_base(parser)


def _report(parser: Parser) -> None:
    about = "the folder of a run, ended or not; several are set side by side"
    parser.add_argument("paths", nargs="*", metavar="RUN", help=about)
    parser.key("out", "FILE.html", "the file to write; of one run, its own report.html where it is left out")
    parser.key("overwrite", "true", "replace FILE.html", switch)


def _completion(parser: Parser) -> None:
    about = 'eval "$(lora-lightning completion bash)", once or in ~/.bashrc; zsh likewise'
    parser.add_argument("shell", nargs="*", metavar="|".join(SHELLS), help=about)


def _check_base(parser: Parser) -> None:
    parser.key("check_base", "false", "accept other base weights than those that it was trained on", switch)


COMMANDS: dict[str, tuple[Callable[[Parser], None], str, str]] = {
    "train": (
        _train,
        "[recipe=NAME] [group=choice] [key=value]",
        "adapt a model",
    ),
    "recipes": (_recipes, "[--config-dir FOLDER]", "the recipes there are, a line each"),
    "copy": (_copy, "NAME FILE.yaml", "a recipe as a file of your own, to be changed"),
    "merge": (
        _merge,
        "ckpt=PATH out=FILE.safetensors [key=value ...]",
        "plain weights, the adapter merged into them",
    ),
    "inspect": (_inspect, "PATH [base=FILE.safetensors]", "what a file or folder of weights holds"),
    "shrink": (
        _shrink,
        "adapter=PATH energy=0.99 out=FOLDER [...]",
        "an adapter made one of lower rank, without its base",
    ),
    "extract": (
        _extract,
        "tuned=PATH energy=0.95 out=FOLDER [...]",
        "fine-tuned weights made an adapter of their base",
    ),
    "compress": (
        _compress,
        "adapter=PATH parameters=0.5 out=FOLDER [...]",
        "an adapted model by smaller plain layers, tested before and after",
    ),
    "push": (
        _push,
        "adapter=PATH to=ADDRESS [key=value ...]",
        "an adapter and its card to the Hugging Face hub or W&B",
    ),
    "transcribe": (
        _transcribe,
        "AUDIO ... adapter=FOLDER [key=value ...]",
        "what is said in audio files and in folders",
    ),
    "predict": (
        _predict,
        "images=FOLDER out=FILE adapter=PATH [...]",
        "what is in pictures: classes, numbers, objects or masks",
    ),
    "serve": (
        _serve,
        "adapter=PATH | adapters=FOLDER [key=value ...]",
        "answers over HTTP, adapters by name",
    ),
    "evaluate": (
        _evaluate,
        "adapter=PATH [data=NAME key=value ...]",
        "scores on the test data, or on others",
    ),
    "export": (
        _export,
        "adapter=PATH format=onnx out=FOLDER [...]",
        "a file that other programs run, with script and card",
    ),
    "report": (_report, "RUN ... [out=FILE.html]", "the page of a run anew, or several runs side by side"),
    "completion": (_completion, "bash|zsh", "Tab completes groups, recipes and options"),
}


def at_home(words: Sequence[str]) -> list[str]:
    """`key=~/x` with the home folder written out: shells do so only where a word begins with `~`."""
    return [re.sub(r"=~(?=/|$)", f"={Path.home()}", word, count=1) for word in words]
