"""What the commands are told that read and write adapters and weights: for `arguments`."""

from __future__ import annotations

import argparse

from lora_lightning.app.arguments_shared import check_base, of_trained
from lora_lightning.app.parser import Parser, found_or_address, some, switch, value_of
from lora_lightning.files.hubs.address import FORMS, address_problem
from lora_lightning.utils.marks import above, matching, number, one_of


def merge(parser: Parser) -> None:
    """Of the command `merge`."""
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
    check_base(parser)


def inspect(parser: Parser) -> None:
    """Of the command `inspect`."""
    about = "an adapter's folder (of PEFT, too), a Trainer's checkpoint or a file that merge wrote"
    parser.add_argument("paths", nargs="*", metavar="PATH", help=about)
    parser.key(
        "base", "FILE.safetensors", "the base's weights, to which changes are compared", found_or_address
    )


def shrink(parser: Parser) -> None:
    """Of the command `shrink`."""
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


def extract(parser: Parser) -> None:
    """Of the command `extract`."""
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


def compress(parser: Parser) -> None:
    """Of the command `compress`."""
    about = "builds the model; without adapter=, its base alone is compressed"
    parser.add_argument("words", nargs="*", metavar="recipe=NAME [key=value ...]", help=about)
    of_trained(parser)
    parser.key("out", "FOLDER", "the folder to write", needed=True)
    share = value_of(float, number(above(0, below=1)))
    parser.key("parameters", "0.5", "the share of the parameters that stays, at most", share)
    parser.key("flops", "0.5", "or: of the FLOPs of linear layers and convolutions", share)
    parser.key("latency", "0.5", "or: of their time on this machine, in the first batch", share)
    parser.key("energy", "0.95", "or: of each layer's output, with the fewest parameters that keep it", share)
    parser.key("batches", "8", "of the training data, by which it is chosen", some)
    parser.key("overwrite", "true", "write into a folder that is not empty", switch)
    check_base(parser)


def push(parser: Parser) -> None:
    """Of the command `push`."""
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
