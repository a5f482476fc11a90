"""Every recipe with its commands, and every choice of every group: they compose and pass the check."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from itertools import zip_longest

import pytest

from lora_lightning.app.command_line import CommandLine
from lora_lightning.app.compose import CONF, RECIPES
from lora_lightning.errors import ConfigError

OPEN = re.compile(
    r"(data\.\w+|model\.name)=null: give "
)  # what only a user can say: which files, which model


def problems_of_line(words: list[str]) -> list[str]:
    try:
        CommandLine(words).check()
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("words", [["-m"], pytest.param([], marks=pytest.mark.slow)], ids=["sweep", "run"])
def test_every_recipe_is_sound_and_says_how_to_run_it(words: list[str]) -> None:
    """As a run of a sweep, whose groups are composed but once; and as Hydra composes each."""
    recipes = sorted(RECIPES.glob("recipe/*.yaml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
        commands = [line[1:].strip() for line in header if line.startswith("#   lora-lightning train")]
        assert commands, recipe
        lines = [shlex.split(command.split("   ")[0])[2:] for command in commands]
        for line in [[f"recipe={recipe.stem}"], *lines]:
            gpu = any(w in ("trainer=ddp", "trainer=gpu") for w in line)
            if not gpu:
                assert all(OPEN.match(problem) for problem in problems_of_line([*words, *line])), line


CHOICES = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name != "hydra"
}
NEEDS = re.compile(r"logger=\w+: needs [\w-]+, which is not installed: pip install ")  # no tracker is in dev
ONE_BY_ONE = [[f"{group}={choice}"] for group, choices in CHOICES.items() for choice in choices]
SIDE_BY_SIDE = [
    [f"{group}={choice}" for group, choice in zip(CHOICES, row, strict=True) if choice]
    for row in zip_longest(*CHOICES.values())
]


@pytest.mark.parametrize("lines", [SIDE_BY_SIDE, pytest.param(ONE_BY_ONE, marks=pytest.mark.slow)])
def test_every_choice_of_every_group_composes(
    lines: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for words in lines:
        told = problems_of_line([*words, "compare=[]"])
        if "trainer=deepspeed" in words and find_spec("deepspeed") is None:
            assert "pip install deepspeed" in told.pop()
        told = [p for p in told if not NEEDS.match(p)]
        of_task = any(word.startswith(("data=", "model=", "task=")) for word in words)
        assert all(of_task and ("is for task=" in p or OPEN.match(p)) for p in told), (words, told)
