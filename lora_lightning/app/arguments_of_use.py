"""What the commands are told that use what was trained: for `arguments`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_lightning.app.arguments_shared import check_base, of_trained
from lora_lightning.app.parser import (
    Parser,
    existing,
    existing_or_url,
    found_or_address,
    some,
    switch,
    value_of,
)
from lora_lightning.exporting.formats import FORMATS
from lora_lightning.utils.marks import Check, above, at_least, between, number, one_of, whole

ADAPTER = "adapter"  # the folder of it in a run's
DEVICES = ("auto", "cpu", "cuda", "mps")
_PORT = Check("0, or a port from 1024 to 65535", lambda v: v == 0 or 1024 <= v <= 65535)


def transcribe(parser: Parser) -> None:
    """Of the command `transcribe`."""
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
    check_base(parser)


def predict(parser: Parser) -> None:
    """Of the command `predict`."""
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
    of_trained(parser, ckpt=True)
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
    check_base(parser)


def serve(parser: Parser) -> None:
    """Of the command `serve`."""
    about = "builds the base, where no adapter's run says how"
    parser.add_argument("words", nargs="*", metavar="recipe=NAME [key=value ...]", help=about)
    parser.key("adapter", "RUN/adapter", "the one adapter: its folder, the run's, or hf:…", found_or_address)
    parser.key(
        "adapters",
        "FOLDER",
        "or: adapters by name, its sub-folders, found while it runs; or s3://…",
        existing_or_url,
    )
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
    check_base(parser)


def _names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name for name in text.split(",") if name]


def _paths(text: str) -> dict[str, str]:
    """Adapters by name: that which is given, else the folder's, of RUN/adapter the run's."""
    found: dict[str, str] = {}
    for word in _names(text):
        name, given, path = word.partition("=")
        path = found_or_address(path if given else word)
        place = Path(path)
        own = place.parent.absolute().name if place.name == ADAPTER else place.absolute().name
        if (name := name if given else own) in found:
            raise argparse.ArgumentTypeError(
                f"{word}: is the second {name!r}; give it a name of its own, NAME=PATH."
            )
        if not name.isidentifier():
            raise argparse.ArgumentTypeError(
                f"{word}: {name!r} is no name of an adapter; give it one, NAME=PATH."
            )
        found[name] = path
    return found


def _axes(text: str) -> str:
    """What is of any size in an exported file."""
    if text in ("stream", "streaming"):
        raise argparse.ArgumentTypeError(
            "a recognizer with attention hears an utterance as a whole, and has no state that goes from "
            "piece to piece; give axes=time and whole utterances."
        )
    sizes: str = value_of(str, one_of("batch", "size", "time", "single"))(text)
    return sizes


def evaluate(parser: Parser) -> None:
    """Of the command `evaluate`."""
    about = "other data than the run's: data=NAME data.key=value; or recipe=NAME, which builds the model"
    parser.add_argument("words", nargs="*", metavar="[data=NAME key=value ...]", help=about)
    of_trained(parser, ckpt=True)
    parser.key("out", "FILE.json", "every score, for programs")
    parser.key("report", "FOLDER", "where the task's own page of it goes")
    parser.key("overwrite", "true", "replace FILE.json", switch)
    check_base(parser)


def export(parser: Parser) -> None:
    """Of the command `export`."""
    about = "builds the model; without adapter= and ckpt=, its base alone is exported"
    parser.add_argument("words", nargs="*", metavar="recipe=NAME [key=value ...]", help=about)
    of_trained(parser, ckpt=True)
    beside = "of format=onnx_adapters: several of one base; NAME=PATH gives one a name"
    parser.key("adapters", "PATH,PATH", beside, _paths)
    form = value_of(str, one_of(*FORMATS))
    parser.key("format", "|".join(FORMATS), "of the file; onnx where it is left out", form)
    parser.key("out", "FOLDER", "the folder to write", needed=True)
    parser.key(
        "axes", "size", "what is of any size: batch; of pictures size, too; of sound time; single", _axes
    )
    parser.key("bytes", "true", "of pictures: bytes go in, and the file normalizes them", switch)
    int8 = value_of(str, one_of("dynamic", "static"))
    parser.key("quantize", "dynamic|static", "int8 of weights; or of all, by the run's training data", int8)
    parser.key("evaluate", "true", "test the file on the run's test data, beside the model", switch)
    parser.key("overwrite", "true", "replace an exported model in FOLDER", switch)
    check_base(parser)
