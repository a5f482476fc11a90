"""The console command `lora-lightning`; what a command needs is loaded once its words are sound."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.app import interrupts
from lora_lightning.app.arguments import SHELLS, at_home, page, parser_of
from lora_lightning.app.interrupts import interruptible
from lora_lightning.app.parser import missing_path
from lora_lightning.errors import FULL, UserError, did_you_mean
from lora_lightning.files.hubs.address import address_problem, is_address
from lora_lightning.utils.libraries import load_lightning
from lora_lightning.utils.tables import truncate_list


def main(words: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        words: in place of `sys.argv[1:]`.

    Raises:
        SystemExit: 0 when done, 2 after a user's mistake, 130 after Ctrl-C.
    """
    words = at_home(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(page())
        raise SystemExit(0 if words else 2)
    command, *rest = words
    try:
        if command not in COMMANDS:
            near = did_you_mean(command, COMMANDS)
            raise UserError(f"{command}: there is no such command.{near} Give one of these:\n\n{page()}")
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
    with _extras("recipes"):  # without torch, which it loads when its own words are sound
        from lora_lightning.app import application
    application.main(words)


def _recipes(words: Sequence[str]) -> None:
    from lora_lightning.app.completion import home_of
    from lora_lightning.app.recipe_list import listed

    given, problems = _given("recipes", words)
    folder = Path(given["config_dir"]) if "config_dir" in given else None
    if folder and not folder.is_dir():
        problems.append(f"--config-dir {folder}: there is no such folder. Give one that there is.")
    _refuse(problems)
    print(listed(home_of(), folder))


def _copy(words: Sequence[str]) -> None:
    given, problems = _given("copy", words)
    named = given["words"]
    if len(named) != 2:
        problems.append("a recipe and a file are needed: give them, lora-lightning copy NAME my.yaml.")
    _refuse(problems)
    with _extras("recipes"):
        from lora_lightning.app.recipe_copy import copy_recipe
    print("\n".join(copy_recipe(named[0], Path(named[1]))))


def _merge(words: Sequence[str]) -> None:
    given, problems = _given("merge", words)
    _refuse(problems)
    path, out = given.pop("ckpt"), given.pop("out")
    with _extras():
        load_lightning()
        from lora_lightning.app.inspect import rounding_text
        from lora_lightning.app.rebuild import merge_files
    with interruptible():
        merged = merge_files(path, out, **given)
    dtypes = {str(t.dtype).removeprefix("torch.") for t in merged.state.values() if t.is_floating_point()}
    print(f"{out}: {len(merged.state)} tensors of {' and '.join(sorted(dtypes))}")
    print(f"{merged.weights} updates merged; {rounding_text(merged.largest, merged.relative)}", flush=True)
    if merged.left_out:
        left_out = truncate_list(merged.left_out)
        print(f"left out, since they are not part of the network: {left_out}", flush=True)


def _inspect(words: Sequence[str]) -> None:
    given, problems = _given("inspect", words)
    paths = given.pop("paths")
    _refuse([*([] if len(paths) == 1 else ["give one path."]), *problems])
    with _extras():
        load_lightning()
        from lora_lightning.app.inspect import inspect
    with interruptible():
        print(inspect(paths[0], given.get("base")), flush=True)


def _shrink(words: Sequence[str]) -> None:
    given, problems = _given("shrink", words)
    _refuse(problems)
    with _extras():
        load_lightning()
        from lora_lightning.app.shrink import shrink
    with interruptible():
        print(shrink(given), flush=True)


def _extract(words: Sequence[str]) -> None:
    given, problems = _given("extract", words)
    of_run = given.pop("words")
    _refuse(problems)
    with _extras("recipes"):
        load_lightning()
        from lora_lightning.app.extract import extract
    with interruptible():
        print(extract(given, of_run), flush=True)


def _compress(words: Sequence[str]) -> None:
    given, problems = _given("compress", words)
    of_run = given.pop("words")
    _refuse(problems)
    with _extras("recipes"):
        load_lightning()
        from lora_lightning.app.compress import compress
        from lora_lightning.app.launch import quiet
    with interruptible(), quiet():
        print(compress(given, of_run), flush=True)


def _push(words: Sequence[str]) -> None:
    given, problems = _given("push", words)
    _refuse(problems)
    with _extras("recipes"):
        load_lightning()
        from lora_lightning.app.push import push
    with interruptible():
        print(push(given), flush=True)


def _transcribe(words: Sequence[str]) -> None:
    given, problems = _given("transcribe", words)
    paths = given.pop("paths")
    problems = [*([] if paths else ["give audio files or folders."]), *problems]
    if not {"adapter", "recipe"} & {word.partition("=")[0] for word in words}:
        problems.append("no recognizer is named: give adapter=FOLDER, or recipe=NAME for its base.")
    chunk, overlap = given.get("chunk", 20.0), given.get("overlap", 4.0)
    if not overlap <= chunk / 2:
        problems.append(f"overlap={overlap:g}: give seconds from 0 to half of chunk={chunk:g}.")
    _refuse(problems)
    with _extras("recipes,speech"):
        load_lightning()
        from lora_lightning.app.transcribe import transcribe
    with interruptible():
        transcribe(paths, given)


def _predict(words: Sequence[str]) -> None:
    given, problems = _given("predict", words)
    of_run = given.pop("words")
    _refuse(problems)
    with _extras("recipes"):
        load_lightning()
        from lora_lightning.app.predict import predict
    with interruptible():
        print(predict(given, of_run), flush=True)


def _serve(words: Sequence[str]) -> None:
    given, problems = _given("serve", words)
    of_run = given.pop("words")
    named = {word.partition("=")[0] for word in words}  # those with a mistake, too
    if not of_run and not named & {"adapter", "adapters", "base"}:
        problems.append("nothing to serve is named: give adapter=PATH, adapters=FOLDER or base=PATH.")
    _refuse(problems)
    with _extras("recipes,serve"):
        from lora_lightning.app.serve import serve
    with interruptible():
        serve(given, of_run)


def _evaluate(words: Sequence[str]) -> None:
    given, problems = _given("evaluate", words)
    of_run = given.pop("words")
    _refuse(problems)
    with _extras("recipes"):
        load_lightning()
        from lora_lightning.app.evaluate import evaluate
        from lora_lightning.app.launch import quiet
    with interruptible(), quiet():
        print(evaluate(given, of_run), flush=True)


def _export(words: Sequence[str]) -> None:
    given, problems = _given("export", words)
    of_run = given.pop("words")
    _refuse(problems)
    with _extras("recipes"):
        load_lightning()
        from lora_lightning.app.export import export
        from lora_lightning.app.launch import quiet
    with interruptible(), quiet():
        print(export(given, of_run), flush=True)


def _report(words: Sequence[str]) -> None:
    given, problems = _given("report", words)
    paths = given.pop("paths")
    _refuse([*([] if paths else ["give the folder of a run, or of several."]), *problems])
    from lora_lightning.app.report import report

    print(report(paths, given))


def _completion(words: Sequence[str]) -> None:
    from lora_lightning.app.completion import script

    given, problems = _given("completion", words)
    shells = given["shell"]
    if problems or len(shells) != 1 or shells[0] not in SHELLS:
        raise UserError(f"completion {' '.join(words)}: give {' or '.join(SHELLS)}.")
    print(script(shells[0]), end="")


PLACES = ("adapter", "ckpt", "file", "folder", "path", "run")  # how a path may have been named
COMMANDS = {
    "train": _train,
    "recipes": _recipes,
    "copy": _copy,
    "merge": _merge,
    "inspect": _inspect,
    "shrink": _shrink,
    "extract": _extract,
    "compress": _compress,
    "push": _push,
    "transcribe": _transcribe,
    "predict": _predict,
    "serve": _serve,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
    "completion": _completion,
}


def _given(command: str, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What a command is told, by name; and what is wrong in it, one line each."""
    parser = parser_of(command)
    read, strays, problems = parser.read(words)
    given = vars(read)
    absent = {path: problem for path in given.get("paths", ()) if (problem := _absent(command, path))}
    strays += [path for path in absent if "=" in path]  # meant as an option
    alone = "paths" in given
    problems += [(alone and _by_itself(command, word)) or parser.stray(word) for word in strays]
    problems += [f"{path}: {problem}" for path, problem in absent.items() if path not in strays]
    if absent:
        given["paths"] = [path for path in given["paths"] if path not in strays]
    return given, problems


def _by_itself(command: str, word: str) -> str:
    """What is said of an option that names the path of a command which takes it by itself; else empty."""
    name, _, path = word.lstrip("-").partition("=")
    if not path or not (name in PLACES or Path(path).expanduser().exists()):
        return ""
    absent = _absent(command, path)
    return f"{word}: give the path alone: lora-lightning {command} {path}" + (
        f" ({absent})" if absent else ""
    )


def _absent(command: str, path: str) -> str:
    """Why there is nothing at a path; of an address only its form is looked at."""
    return address_problem(path) if command == "inspect" and is_address(path) else missing_path(path)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


@contextlib.contextmanager
def _extras(names: str = "") -> Iterator[None]:
    """Around the imports of a command that needs these extras of the package.

    Raises:
        UserError: a library of theirs is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not names:
            raise
        raise UserError(f"this needs {error.name}: pip install 'lora-lightning[{names}]'") from None
