"""Each embedded recipe, ended by SIGTERM or SIGKILL at a random step and resumed in a new process, ends bit
for bit as the run that was not."""

import json
import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import torch
from killed_recipe import main
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

processes = multiprocessing.get_context("forkserver")  # each process is a new one, all imports done once
processes.set_forkserver_preload(["killed_recipe", "timm", "torchvision.models", "hydra.utils"])

DIGITS = [
    "data.train_size=80",
    "data.batch_size=16",
    "trainer.max_epochs=3",
    "trainer.accumulate_grad_batches=2",
]
SHAPES = [
    "data.train_size=16",
    "data.val_size=4",
    "data.test_size=4",
    "data.batch_size=4",
    "trainer.max_epochs=2",
]
ACCENTS = [
    "data.train_size=12",
    "data.batch_size=4",
    "trainer.max_epochs=4",
    "trainer.check_val_every_n_epoch=2",
]
LIMITS = ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
RECIPES = {  # words, and steps in all; accents: of two adapters
    "vit_digits": (DIGITS, 15),
    "resnet_digits": ([*DIGITS, "lora.train_norm=stats", "lora.dropout=0.1"], 15),
    "fcos_shapes": (SHAPES, 8),
    "accent_espeak": ([*ACCENTS, *LIMITS], 24),
}


def run(folder: Path, words: list[str], number: int = 0, step: int = 0) -> int | None:
    folder.mkdir(exist_ok=True)
    process = processes.Process(target=main, args=(folder, words, number, step))
    process.start()
    process.join(600)
    return process.exitcode


def outcome(folder: Path) -> dict:
    """Every adapter, every last checkpoint's weights and optimizer state, and the scores."""
    found = {}
    for file in sorted((folder / "run").rglob("*")):
        name = str(file.relative_to(folder))
        if file.name == "adapter_model.safetensors":
            found[name] = load_file(file)
        elif file.name in ("last.ckpt", "best.ckpt"):
            checkpoint = torch.load(file, weights_only=True)
            found[name] = [checkpoint[key] for key in ("state_dict", "optimizer_states", "epoch")]
    for file in (folder / "run").glob("**/results.json"):
        results = json.loads(file.read_text())
        if isinstance(results, list):  # of one run, not of several adapters
            found[str(file)[len(str(folder)) :]] = [r["scores"] for r in results]
    return found


def differences(one: dict, other: dict) -> list[int]:
    (ours, spec), (theirs, other_spec) = tree_flatten(one), tree_flatten(other)
    assert spec == other_spec
    pairs = enumerate(zip(ours, theirs, strict=True))
    return [i for i, (a, b) in pairs if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)]


def words_of(recipe: str) -> list[str]:
    return [f"recipe={recipe}", *RECIPES[recipe][0], "compare=[]", "hydra.run.dir=run"]


def check(recipe: str, folder: Path, wanted: dict, deaths: list[tuple[int, int]]) -> None:
    words = words_of(recipe)
    for number, step in deaths:
        code = run(folder, words, number, step)
        assert code == (143 if number == signal.SIGTERM else -number), (folder / "log.txt").read_text()
        words = ["resume=run"]
    assert run(folder, words) == 0, (folder / "log.txt").read_text()
    assert not differences(outcome(folder), wanted)


def test_a_recipe_preempted_in_an_epoch_ends_as_the_unstopped_one(tmp_path):
    """Its augmentation draws random numbers in `on_after_batch_transfer`."""
    assert run(tmp_path / "whole", words_of("vit_digits")) == 0, (tmp_path / "whole" / "log.txt").read_text()
    check("vit_digits", tmp_path / "stopped", outcome(tmp_path / "whole"), [(signal.SIGTERM, 7)])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_killed_anywhere_ends_as_the_unstopped_one(recipe, tmp_path):
    assert run(tmp_path / "whole", words_of(recipe)) == 0, (tmp_path / "whole" / "log.txt").read_text()
    wanted = outcome(tmp_path / "whole")
    steps = RECIPES[recipe][1]
    chance = random.Random(recipe)
    last = steps // 2 if recipe == "accent_espeak" else steps  # an adapter's last step, an epoch's too
    for trial, first in enumerate([last, *(chance.randint(1, steps) for _ in range(4))]):
        times = 1 if first == steps else 1 + chance.randint(0, 1)  # after the last step there is no other
        numbers = [chance.choice((signal.SIGTERM, signal.SIGKILL)) for _ in range(times)]
        deaths = [(numbers[0], first), *((number, 1) for number in numbers[1:])]
        check(recipe, tmp_path / f"stopped {trial}", wanted, deaths)
