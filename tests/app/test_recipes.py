"""`lora-lightning recipes` and `copy`: what is listed, and a copy that is the recipe itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_lightning.app.cli import main
from lora_lightning.app.command_line import CommandLine
from lora_lightning.app.compose import CONF, RECIPES, Configurations, Own, shipped
from lora_lightning.app.recipe_copy import recipe_text
from lora_lightning.app.recipe_list import TITLES
from lora_lightning.app.recipe_text import description, is_recipe, written
from lora_lightning.app.static_docs import UNKNOWN, documented
from lora_lightning.config import LoRAConfig

NAMES = shipped().choices("recipe")
OPTION = re.compile(r"^( *)# ((?: *)\w+:(?: |$))", re.MULTILINE)  # a commented one


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def composed(file: str | None, recipe: str) -> Any:
    known = Configurations(Own(recipe=Path(file))) if file else shipped()
    config = known.compose_groups([f"recipe={recipe}"])
    assert not isinstance(config, str), config
    plain: Any = OmegaConf.to_container(config, resolve=False)
    plain.pop("hydra")
    return plain


QUICK = ("accent_left_out", "vit_cifar")  # one that begins with another, one with a Trainer of its own


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_copy_is_the_recipe_and_its_comments_are_its_options(name: str) -> None:
    text = recipe_text(name, "my.yaml")
    Path("my.yaml").write_text(text)
    assert composed("my.yaml", "my") == composed(None, name)
    assert is_recipe(Path("my.yaml")) and description(text)
    head, _, body = text.partition("\ndefaults:\n")
    assert all(len(line) <= 120 for line in body.splitlines())
    body, count = OPTION.subn(r"\1\2", body)
    assert count > 20
    Path("all.yaml").write_text(f"{head}\ndefaults:\n{body}")
    true, every = composed(None, name), composed("all.yaml", "all")
    assert_within(true, every)
    CommandLine(["recipe=all.yaml", "--cfg", "job"]).check()


def assert_within(part: Any, whole: Any) -> None:
    """Whatever is set in one is the same in the other."""
    if isinstance(part, dict) and isinstance(whole, dict):
        for key, value in part.items():
            assert_within(value, whole[key])
    else:
        assert part == whole


def test_the_words_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["copy", "resnet_digits", "my.yaml"])
    assert "lora-lightning train recipe=my.yaml" in capsys.readouterr().out
    Path("more", "recipe").mkdir(parents=True)
    Path("more", "recipe", "small.yaml").write_text(
        "# @package _global_\n# Small ones. Two.\nlora: {rank: 2}\n"
    )
    Path("more", "recipe", "cut.yaml").write_bytes(b"\xff\xfe")
    Path("other.yaml").write_text("a: 1\n")
    main(["recipes"])
    page = capsys.readouterr().out
    assert all(f"\n  {name} " in page for name in NAMES)
    assert re.search(r"\nYours\n  recipe=my\.yaml +A small ResNet with BatchNorm", page)
    assert "other.yaml" not in page and "recipe=small" not in page
    main(["recipes", "--config-dir", "more"])
    page = capsys.readouterr().out
    assert re.search(r"\n  --config-dir more recipe=small +Small ones\n", page)
    assert re.search(r"\n  --config-dir more recipe=cut +cannot be read", page)


def test_every_recipe_says_what_it_does_and_every_task_has_a_title() -> None:
    assert {file.stem for file in (CONF / "task").glob("*.yaml")} <= TITLES.keys()
    for name in NAMES:
        assert len(description((RECIPES / "recipe" / f"{name}.yaml").read_text())) > 20, name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("copy", ["a recipe and a file are needed"]),
        (
            "copy vit_digts my.txt",
            ["Did you mean 'vit_digits'", "my.txt: is no recipe's file: give one that ends in .yaml"],
        ),
        ("copy vit_digits there.yaml", ["there.yaml is there already"]),
        ("copy vit_digits nowhere/my.yaml", ["there is no folder nowhere"]),
        ("copy vit_digits vit_cifar.yml", ["ends in .yaml"]),
        ("copy vit_digits a,b.yaml", ["give the file one of letters, digits"]),
        ("recipes --config-dir nowhere x", ["nowhere: there is no such folder", "x: there is no"]),
    ],
)  # fmt: skip
def test_mistakes(words: str, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.yaml").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    out, message = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert all(words in message for words in told), message
    assert [p.name for p in Path().iterdir()] == ["there.yaml"]
    assert Path("there.yaml").read_text() == "mine"


def test_values_are_read_with_their_comments() -> None:
    text = "# head\na: 1 # one\n# two\n# lines\nb: # of b\n  c: [x,\n    y] # list\n"
    text += "  d:\n  e:\n    - 1\n    - {f: 2}\n"
    found = written(text)
    assert found[("a",)] == ("1", (), "one")
    assert found[("b",)] == ("", ("two", "lines"), "of b")
    assert found["b", "c"] == ("[x,\n    y]", (), "list")
    assert found["b", "d"].text == "null" and found["b", "e"].text == "[1, {f: 2}]"


def test_options_are_described_by_their_source() -> None:
    found = documented("lora_lightning.data.named_sets.NamedSetDataModule")
    assert found["download"] == (
        "fetch the set into `root`, or unpack its archives there, if it is not there",
        False,
    )
    assert found["crop_pct"] == ("share of the shorter side that evaluation keeps", None)  # of its base class
    assert documented(LoRAConfig)["rank_pattern"].default is UNKNOWN  # made anew each time
    assert documented("lora_lightning.models.detection.detector")["pretrained"].default is False
    assert documented("os.nowhere") == {} and documented("lora_lightning.nowhere") == {}
