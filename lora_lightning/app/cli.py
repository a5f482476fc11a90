"""The console command `lora-lightning`; what a command needs is loaded once its words are sound."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lora_lightning.app import arguments, interrupts
from lora_lightning.app.arguments import at_home, missing_path, parsed, transcribe_problems, usage
from lora_lightning.app.interrupts import interruptible
from lora_lightning.errors import FULL, UserError, did_you_mean
from lora_lightning.utils.libraries import load_lightning
from lora_lightning.utils.tables import truncate_list

LIGHT = ("lora_lightning.app.application",)  # it loads torch when the words are sound
HELP = ("-h", "--help")


def main(words: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        words: in place of `sys.argv[1:]`.

    Raises:
        SystemExit: 0 when done, 2 after a user's mistake, 130 after Ctrl-C.
    """
    words = at_home(sys.argv[1:] if words is None else words)
    if not words or words[0] in HELP:
        print(usage())
        raise SystemExit(0 if words else 2)
    command, *rest = words
    try:
        if command not in COMMANDS:
            raise UserError(
                f"{command}: there is no such command.{did_you_mean(command, COMMANDS)}\n{usage()}"
            )
        if command != "train" and any(word in HELP for word in rest):
            print(usage(command))
        else:
            COMMANDS[command](rest)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        interrupts.said()
        raise SystemExit(interrupts.INTERRUPTED) from None
    except BrokenPipeError:  # of `lora-lightning inspect … | head`; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # of pictures, which others write
        if error.errno not in FULL:
            raise
        where = error.filename or "a file"
        print(
            f"{where} cannot be written: {error.strerror}. Make room, or give another place.", file=sys.stderr
        )
        raise SystemExit(2) from None


def _train(words: Sequence[str]) -> None:
    _loaded("lora_lightning.app.application", "recipes").main(words)


def _merge(words: Sequence[str]) -> None:
    needed = ("ckpt=PATH", "out=FILE.safetensors")
    names = [word.partition("=")[0] for word in words]
    lacking = [option for option in needed if option.partition("=")[0] not in names]
    given = parsed(words, arguments.MERGE, [f"give {' and '.join(lacking)}."] if lacking else [])
    path, out = given.pop("ckpt"), given.pop("out")
    rebuild, inspection = _loaded("lora_lightning.app.rebuild"), _loaded("lora_lightning.app.inspect")
    with interruptible():
        merged = rebuild.merge_files(path, out, **given)
    dtypes = {str(t.dtype).removeprefix("torch.") for t in merged.state.values() if t.is_floating_point()}
    print(f"{out}: {len(merged.state)} tensors of {' and '.join(sorted(dtypes))}")
    rounding = inspection.rounding_text(merged.largest, merged.relative)
    print(f"{merged.weights} updates merged; {rounding}", flush=True)
    if merged.left_out:
        print(
            f"left out, since they are not part of the network: {truncate_list(merged.left_out)}", flush=True
        )


def _inspect(words: Sequence[str]) -> None:
    paths = [w for w in words if "=" not in w or os.path.exists(w)]
    problems = [] if len(paths) == 1 else ["give one path."]
    problems += [missing_path(path) for path in paths if not os.path.exists(path)]
    given = parsed([w for w in words if w not in paths], arguments.INSPECT, problems)
    inspection = _loaded("lora_lightning.app.inspect")
    with interruptible():
        print(inspection.inspect(paths[0], given.get("base")), flush=True)


def _transcribe(words: Sequence[str]) -> None:
    paths = [w for w in words if "=" not in w or os.path.exists(w)]
    problems = [] if paths else ["give audio files or folders."]
    problems += [missing_path(path) for path in paths if not os.path.exists(path)]
    given = parsed([w for w in words if w not in paths], arguments.TRANSCRIBE, problems, transcribe_problems)
    transcription = _loaded("lora_lightning.app.transcribe", "recipes,speech")
    with interruptible():
        transcription.transcribe(paths, given)


def _predict(words: Sequence[str]) -> None:
    own = [w for w in words if w.partition("=")[0] in arguments.PREDICT]
    problems = [] if any(w.startswith("out=") for w in own) else ["give out=FOLDER."]
    given = parsed(own, arguments.PREDICT, problems)
    prediction = _loaded("lora_lightning.app.predict", "recipes")
    with interruptible():
        print(prediction.predict(given, [w for w in words if w not in own]), flush=True)


def _completion(words: Sequence[str]) -> None:
    from lora_lightning.app.completion import script

    if len(words) != 1 or words[0] not in ("bash", "zsh"):
        raise UserError(f"completion {' '.join(words)}: give bash or zsh.\n{usage('completion')}")
    print(script(words[0]), end="")


def _loaded(module: str, extras: str = "") -> Any:
    """The module of a command, with torch and all that it needs.

    Raises:
        UserError: a library of these extras is not installed, or does not load.
    """
    try:
        if module not in LIGHT:
            load_lightning()
        return import_module(module)
    except ModuleNotFoundError as error:
        if not extras:
            raise
        raise UserError(f"this needs {error.name}: pip install 'lora-lightning[{extras}]'") from None


COMMANDS = {
    "train": _train,
    "merge": _merge,
    "inspect": _inspect,
    "transcribe": _transcribe,
    "predict": _predict,
    "completion": _completion,
}
