"""What is done to each command of the documentation: executed, composed, parsed, or left, and then why.

A command that nothing here knows is an error: whoever writes one on a page says here what it is.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import ruff
from pages import ROOT
from shell import Command

from lora_lightning.app.application import main as train
from lora_lightning.app.arguments import COMMANDS, at_home, parser_of
from lora_lightning.app.cli import main as ours
from lora_lightning.app.command_line import CommandLine, command_config
from lora_lightning.errors import ConfigError
from lora_lightning.files.hubs.address import is_address

SHORT = ["debug=fast", "trainer.enable_progress_bar=false", "trainer=cpu", "logger=csv"]
"""Before the words of every training that is executed; those of the page come after, and win."""
STANDS_FOR = {
    "recipe=NAME": "recipe=vit_digits",
    "search.trials=30": "search.trials=2",
    "search.trials=50": "search.trials=3",
    "trainer.max_epochs=40": "trainer.max_epochs=2",
}
"""Words of a page that are others where it is followed."""
SPEECH = {
    "extractor_conv_layer_config": "[[16,10,5],[16,3,2],[16,3,2]]",
    "encoder_embed_dim": 32,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 64,
}
EMBEDDED = (
    "vit_digits", "resnet_digits", "fcos_shapes", "fasterrcnn_shapes", "accent_espeak", "accent_left_out",
    "edge_digits", "edge_accent",
)  # fmt: skip
MODELS: dict[str, list[str]] = {  # of recipes that are executed: what takes the place of a large model
    **{name: [] for name in EMBEDDED},
    "my_photos": ["model.name=test_vit", "model.pretrained=false"],
    "my_voice": ["model.pretrained=false", *(f"+model.{name}={value}" for name, value in SPEECH.items())],
    "segment_folder": [
        "model=timm_segmenter", "model.name=test_resnet", "model.pretrained=false", "model.head_width=16",
        "data.image_size=24", "data.crop_size=24", "data.batch_size=2", "trainer.precision=32-true",
    ],
    "fasterrcnn_coco": [
        "model.name=fcos_small", "model.pretrained=false", "model.min_size=64", "model.max_size=96",
        "trainer.precision=32-true",
    ],
}  # fmt: skip
"""Trainings by other recipes, of data or weights that are not here, are composed and checked."""
COPY = re.compile(r"^# A copy of recipe=(\w+)", re.MULTILINE)
NOT_HERE = ("this machine shows no such device", "the other machines are unknown here")
DEVICES = re.compile(r"(hydra/launcher|trainer(\.devices|\.strategy)?)=")
"""Words that ask for devices or a cluster: such a training is composed and checked."""
PARTS = [
    f"data.{part}={part}" for part in ("train_images", "train_annotations", "val_images", "val_annotations")
]
OTHER_DATA = {
    "coco_format": ["recipe=fcos_coco", *PARTS],
    "manifest": ["recipe=wav2vec2_manifest"],
    "imagefolder": ["recipe=my_photos"],
}
"""By which words about other data than a run's are composed."""
HUB = re.compile(r"(^|=)(hf|wandb):")
"""Adapters that a hub has: such a command is checked."""
PROGRAMS = ("benchmarks", "tests", "lora_lightning")
"""Packages whose programs are parsed: most of them take minutes."""
RUFF = Path(ruff.__file__).parents[4] / "bin" / "ruff"
HELP = {  # what lists the options of a tool
    "pip": ("-m", "pip", "install", "--help"),
    "venv": ("-m", "venv", "--help"),
    "pytest": ("-m", "pytest", "--help"),
    "build": ("-m", "build", "--help"),
    "ruff check": ("-c", f"import os; os.execv({str(RUFF)!r}, ['ruff', 'check', '--help'])"),
    "ruff format": ("-c", f"import os; os.execv({str(RUFF)!r}, ['ruff', 'format', '--help'])"),
    "mypy": ("-m", "mypy", "--help"),
    "pre-commit install": ("-m", "pre_commit", "install", "--help"),
    **{f"wandb {word}": ("-m", "wandb", word, "--help") for word in ("sync", "sweep", "agent", "login")},
}
ABSENT = {
    "srun": "there is no SLURM here; the command after it is composed",
    "sbatch": "there is no SLURM here",
    "git": "the repository's, which is not this folder",
    "hf": "would ask the network",
    "curl": "tests/serving/test_server.py runs it against a server",
    "mkdocs": "tests/docs/test_site.py builds the site",
    "benchmarks/gpu.sh": "needs a GPU; tests/benchmarks/test_gpu_script.py reads it",
}
TESTS_OF_THE_PAGE = ["pytest", "-q"]  # in its own folder, with the package that lies there
FILES = ("mkdir", "cp", "mv", "ls", "cat", "rm")


@dataclass(frozen=True)
class Treatment:
    """What is done to a command.

    Args:
        name: one word, and for a command that is not executed the reason.
        check: finds a misspelt option without running anything.
        run: runs it; None where that is not done.
    """

    name: str
    check: Callable[[], object]
    run: Callable[[], object] | None = None


def treatment_of(command: Command) -> Treatment:
    """What is done to a command.

    Raises:
        LookupError: nothing here knows it.
    """
    program, *words = command.words
    program = program.removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        return _python(words)
    if program == "lora-lightning":
        return _train(words[1:]) if words[:1] == ["train"] else _ours(words)
    if program == "torchrun":
        return _torchrun(words)
    if program in ABSENT:
        inner = treatment_of(Command(tuple(words))).check if words[:1] == ["python"] else lambda: None
        return Treatment(f"left: {ABSENT[program]}", inner)
    if program in FILES:
        run = functools.partial(subprocess.run, command.words, check=True)
        return Treatment("executed", run, run)
    return _tool([program, *words])


def _python(words: Sequence[str]) -> Treatment:
    if words[0] == "train.py":
        return _train(words[1:])
    if words[0] == "-m":
        _, module, *rest = words
        if words[1:3] == TESTS_OF_THE_PAGE:
            run = functools.partial(_printed, (sys.executable, *words))
            return Treatment("executed", lambda: None, run)
        return _program(module, rest) if module.split(".")[0] in PROGRAMS else _tool([module, *rest])
    if words[0].endswith("/run.py"):  # of a model that the page has exported
        return Treatment("executed", lambda: None, functools.partial(_script, words))
    return _program(words[0].removesuffix(".py").replace("/", "."), words[1:])


def _script(words: Sequence[str]) -> None:
    """Run a file of Python."""
    with patch("sys.argv", list(words)):
        runpy.run_path(words[0], run_name="__main__")


def _train(words: Sequence[str]) -> Treatment:
    words = [STANDS_FOR.get(word, word) for word in words]
    recipe = next((w.partition("=")[2] for w in words if w.startswith("recipe=")), "vit_digits")

    def check() -> None:
        _composed([word for word in at_home(words) if not word.startswith("resume=")])

    def run() -> None:
        if "--help" in words:
            return train(words)
        if resumed := [word for word in words if word.startswith("resume=")]:
            if words == resumed:
                Path(resumed[0].partition("=")[2], "results.json").unlink()  # as if stopped before its end
            return train(words)
        folder = [f"hydra.run.dir=outputs/{Path(recipe).stem}/DATE", "hydra.sweep.dir=outputs/sweep"]
        search = ["search.trials=2"] * ("hparams_search=optuna" in words)
        return train([*SHORT, *folder, *search, *_small(recipe), *words])

    if recipe not in MODELS and not recipe.endswith(".yaml"):
        made = recipe.startswith("pretrain_")
        reason = "makes a base that ships" if made else "needs data or weights that are not here"
        return Treatment(f"composed: {recipe} {reason}", check)
    if recipe.startswith("accent_") and any(word.startswith("data.root=") for word in words):
        return Treatment("composed: needs a corpus that takes minutes", check)
    if any(DEVICES.match(word) for word in words):
        return Treatment("composed: needs devices", check)
    if recipe != "vit_digits" and any(word.startswith("model=") for word in words):
        return Treatment("composed: needs weights", check)
    return Treatment("executed", check, run)


def _composed(words: Sequence[str]) -> None:
    """Refuse what is misspelt, on a machine with devices."""
    try:
        CommandLine(words).check()
    except ConfigError as error:
        if not all(any(sign in problem for sign in NOT_HERE) for problem in error.problems):
            raise


def _small(recipe: str) -> list[str]:
    """What takes the place of the recipe's model, or of that which it is a copy of."""
    if recipe.endswith(".yaml"):
        copied = COPY.search(Path(recipe).read_text(encoding="utf-8"))
        recipe = copied[1] if copied else "vit_digits"
    return MODELS[recipe]


def _ours(words: Sequence[str]) -> Treatment:
    name, *rest = words
    if name not in COMMANDS:
        raise LookupError(f"lora-lightning {name}: there is no such command.")

    def check() -> None:
        parser = parser_of(name)
        given, strays, problems = parser.read(rest)
        problems = [p for p in problems if "there is no such file or folder" not in p]
        problems += [parser.stray(word) for word in strays]
        assert not problems, problems
        if name in ("predict", "evaluate", "extract", "export") and given.words:
            command_config(_with_recipe(given.words))

    def run() -> None:
        try:
            ours(words)
        except SystemExit as ended:
            if ended.code:
                raise

    if any(is_address(word.partition("=")[2]) for word in rest):
        return Treatment("parsed: would ask the network", check)
    if "format=executorch" in rest and importlib.util.find_spec("executorch") is None:
        return Treatment("parsed: needs ExecuTorch", check)
    recipe = next((w.partition("=")[2] for w in rest if w.startswith("recipe=")), "vit_digits")
    if recipe not in EMBEDDED:
        return Treatment(f"composed: {recipe} needs weights", check)
    if name == "serve":
        return Treatment("parsed: would not end; tests/serving/test_server.py starts one", check)
    if name == "push" or any(HUB.search(word) for word in words):
        return Treatment("composed: asks a hub", check)
    return Treatment("executed", check, run)


def _with_recipe(words: Sequence[str]) -> list[str]:
    data = next((w.partition("=")[2] for w in words if w.startswith("data=")), "imagefolder")
    return [*([] if "recipe=" in " ".join(words) else OTHER_DATA[data]), *words]


class Parsed(Exception):
    """The words of a program are sound."""


def _program(module: str, words: Sequence[str]) -> Treatment:
    """One of ours that is run by `python -m`: up to where it has read its words."""

    def check() -> None:
        read = argparse.ArgumentParser.parse_args

        def parse(self: argparse.ArgumentParser, *given: object, **options: object) -> None:
            read(self, *given, **options)  # type: ignore[arg-type]
            raise Parsed

        if not words:
            assert importlib.util.find_spec(module), f"there is no module {module}"
            return
        with patch.object(argparse.ArgumentParser, "parse_args", parse), patch("sys.argv", [module, *words]):
            try:
                runpy.run_module(module, run_name="__main__")
            except Parsed:
                return
        raise AssertionError(f"python -m {module} reads no words")

    return Treatment("parsed: takes minutes, or what is not here", check)


def _torchrun(words: Sequence[str]) -> Treatment:
    def check() -> None:
        from torch.distributed.run import parse_args

        given = parse_args(list(words))
        assert given.training_script == "train.py"
        _train(given.training_script_args).check()

    return Treatment("parsed: needs several machines; its train.py is composed", check)


def _printed(words: Sequence[str]) -> None:
    ran = subprocess.run(words, capture_output=True, text=True)
    print(ran.stdout, ran.stderr)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


@functools.cache
def _help(words: tuple[str, ...]) -> str:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout


def _extras() -> set[str]:
    """Those of the package."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    part = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", part, re.MULTILINE))


def _tool(words: Sequence[str]) -> Treatment:
    """A command of others: whether its options are there, and the extras of ours that it names."""
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in HELP), None)
    if name is None:
        raise LookupError(f"{' '.join(words)}: say in tests/docs/commands.py what this is.")

    def check() -> None:
        options = [w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)]
        if options:
            page = _help(HELP[name])
            absent = [o for o in options if not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w-])", page)]
            assert not absent, f"{name} has no {absent}"
        extras = {e for w in words for e in re.findall(r"\[([\w,]+)\]$", w) if name == "pip"}
        assert {e for group in extras for e in group.split(",")} <= _extras(), extras

    return Treatment("parsed: of others", check)
