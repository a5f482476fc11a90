"""The console command `lora-lightning`: train, merge, inspect, transcribe, predict."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.export import merge_files
from lora_lightning.inspection import inspect, rounding_text
from lora_lightning.report import listed

MERGE_OPTIONS = {
    "ckpt": str, "out": str, "base": str, "adapter": str, "overwrite": bool, "any_base": bool,
}  # fmt: skip
COMMANDS = ("train", "merge", "inspect", "transcribe", "predict")
USAGE = """\
lora-lightning train [recipe=NAME] [group=choice] [key=value]   adapt a model; train --help lists all
lora-lightning merge ckpt=PATH out=FILE.safetensors             plain weights, the adapter merged into them
    base=FILE.safetensors   the base's weights, where the run of PATH cannot tell them
    adapter=NAME            which one of a checkpoint that holds several
    overwrite=true          replace FILE
    any_base=true           accept other base weights than those that it was trained on
lora-lightning inspect PATH [base=FILE.safetensors]             what an adapter, checkpoint or merged file is
lora-lightning transcribe AUDIO... adapter=FOLDER               what is said in audio files and in folders
    recipe=NAME             builds the model; without adapter=, its base alone is used
    format=plain|srt|json   text, subtitles, or everything with the time of each word
    out=FILE or FOLDER      instead of the screen
    device=cuda             chunk=20 overlap=4 seconds, batch=4 chunks at once
    beam=32 lm=FILE.arpa lexicon=FILE   beam search with a language model or a list of words
lora-lightning predict images=FOLDER out=FOLDER adapter=FOLDER  what a detector finds: JSON and pictures
    ckpt=FILE               a Trainer's checkpoint in place of the adapter's folder
    recipe=NAME [key=value] builds the model; without adapter= and ckpt=, its base alone is used
    score=0.5               least score of what pictures show; batch_size=8 num_workers=4 overwrite=true

PATH is an adapter's folder (of PEFT, too) or a Trainer's checkpoint."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: 0 when done, 2 after a user's mistake, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if words else 2)
    command, *rest = words
    try:
        if command == "train":
            _train(rest)
        elif command == "merge":
            print(_merge(rest), flush=True)
        elif command == "inspect":
            print(_inspect(rest), flush=True)
        elif command == "transcribe":
            _transcribe(rest)
        elif command == "predict":
            print(_predict(rest), flush=True)
        else:
            raise UserError(f"{command}: there is no such command.{did_you_mean(command, COMMANDS)}\n{USAGE}")
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # of `lora-lightning inspect … | head`; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _merge(words: Sequence[str]) -> str:
    given = _options(words, MERGE_OPTIONS)
    if missing := [name for name in ("ckpt", "out") if name not in given]:
        raise UserError(f"give {' and '.join(f'{n}=...' for n in missing)}.\n{USAGE}")
    path, out = given.pop("ckpt"), given.pop("out")
    merged = merge_files(path, out, **given)
    dtypes = {str(t.dtype).removeprefix("torch.") for t in merged.state.values() if t.is_floating_point()}
    lines = [
        f"{out}: {len(merged.state)} tensors of {' and '.join(sorted(dtypes))}",
        f"{merged.weights} updates merged; {rounding_text(merged.largest, merged.relative)}",
    ]
    if merged.left_out:
        lines.append(f"left out, since they are not part of the network: {listed(merged.left_out)}")
    return "\n".join(lines)


def _inspect(words: Sequence[str]) -> str:
    paths = [w for w in words if "=" not in w]
    given = _options([w for w in words if w not in paths], {"base": str})
    if len(paths) != 1:
        raise UserError(f"give one path.\n{USAGE}")
    return inspect(paths[0], given.get("base"))


def _transcribe(words: Sequence[str]) -> None:
    try:
        from lora_lightning.app.transcribe import OPTIONS, transcribe
    except ModuleNotFoundError as error:
        raise UserError(
            f"`lora-lightning transcribe` needs {error.name}: pip install 'lora-lightning[recipes,speech]'"
        ) from None
    paths = [w for w in words if "=" not in w or os.path.exists(w)]
    transcribe(paths, _options([w for w in words if w not in paths], OPTIONS))


def _predict(words: Sequence[str]) -> str:
    try:
        from lora_lightning.app.predict import OPTIONS, predict
    except ModuleNotFoundError as error:
        raise UserError(
            f"`lora-lightning predict` needs {error.name}: pip install 'lora-lightning[recipes]'"
        ) from None
    own = [w for w in words if w.partition("=")[0] in OPTIONS]
    return predict(_options(own, OPTIONS), [w for w in words if w not in own])


def _options(words: Sequence[str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """`key=value` words as options; every mistake in one message.

    Raises:
        UserError: an unknown, repeated or malformed word.
    """
    given: dict[str, Any] = {}
    problems = []
    for word in words:
        name, equals, value = word.partition("=")
        if name not in kinds:
            problems.append(f"{word}: there is no such option.{did_you_mean(name, kinds)}")
        elif not equals or not value:
            problems.append(f"{word}: give {name}=VALUE.")
        elif name in given:
            problems.append(f"{word}: {name} is given twice.")
        elif kinds[name] in (int, float) and not _is_number(value, kinds[name]):
            problems.append(f"{word}: give a {'whole ' * (kinds[name] is int)}number.")
        elif kinds[name] is bool and value not in ("true", "false"):
            near = did_you_mean(value, ("true", "false"))
            problems.append(f"{word}: give {name}=true or {name}=false.{near}")
        given[name] = value
    if problems:
        raise UserError("\n".join([*problems, f"Options: {', '.join(kinds)}."]))
    return {n: v == "true" if kinds[n] is bool else kinds[n](v) for n, v in given.items()}


def _is_number(value: str, kind: type) -> bool:
    try:
        return math.isfinite(kind(value))
    except ValueError:
        return False


def _train(words: Sequence[str]) -> None:
    try:
        from lora_lightning.train import main as train
    except ModuleNotFoundError as error:
        raise UserError(
            f"`lora-lightning train` needs {error.name}: pip install 'lora-lightning[recipes]'"
        ) from None
    train(words)
