"""The console command `lora-lightning`: train, and inspect an adapter folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lora_lightning.checkpoint import TENSOR_FILE, read_adapter
from lora_lightning.errors import UserError, did_you_mean

COMMANDS = ("train", "inspect")
USAGE = """\
lora-lightning train [recipe=NAME] [group=choice] [key=value]   adapt a model; train --help lists all
lora-lightning inspect FOLDER                                    what an adapter folder holds"""


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
        elif command == "inspect":
            print(inspect(rest))
        else:
            raise UserError(f"{command}: there is no such command.{did_you_mean(command, COMMANDS)}\n{USAGE}")
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def inspect(words: Sequence[str]) -> str:
    """The plan of an adapter folder, its configuration where it is not the default, and its size.

    Raises:
        UserError: not one folder given.
        AdapterFileError: the folder is not an adapter, or a damaged one.
    """
    if len(words) != 1:
        raise UserError("Give one folder: lora-lightning inspect FOLDER")
    about, tensors = read_adapter(words[0])
    default = type(about.config)().to_dict()
    changed = [f"{k}={v}" for k, v in about.config.to_dict().items() if v != default[k]]
    size = (Path(words[0]) / TENSOR_FILE).stat().st_size
    return (
        f"{about.plan}\noptions: {', '.join(changed) or 'all at their defaults'}\n"
        f"file: {len(tensors)} tensors, {size / 1e6:.2f} MB"
    )


def _train(words: Sequence[str]) -> None:
    try:
        from lora_lightning.train import main as train
    except ModuleNotFoundError as error:
        raise UserError(
            f"`lora-lightning train` needs {error.name}: pip install 'lora-lightning[recipes]'"
        ) from None
    train(words)
