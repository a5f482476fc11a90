"""`recipe=my.yaml`: a recipe that is named by its file, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lora_lightning.app.command_line import CommandLine
from lora_lightning.app.completion import complete
from lora_lightning.app.resume import resumed
from lora_lightning.errors import ConfigError

TEXT = "# @package _global_\ndefaults:\n  - resnet_digits\nlora:\n  rank: 3\n"


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("word", ["recipe=my.yaml", "recipe=./my.yaml", "recipe={folder}/my.yaml"])
def test_it_is_found_by_its_path(word: str, tmp_path: Path) -> None:
    Path("my.yaml").write_text(TEXT)
    Path("other", "recipe").mkdir(parents=True)  # beside a folder of them
    Path("other", "recipe", "small.yaml").write_text("# @package _global_\nlora: {rank: 2}\n")
    config = CommandLine([word.format(folder=tmp_path), "--config-dir", "other", "lora.alpha=5"]).check()
    assert config is not None
    assert (config.lora.rank, config.lora.alpha, config.model.name) == (3, 5, "resnet10t")
    assert config.hydra.runtime.choices.recipe == "my"  # which names the run's folder


def test_it_takes_the_place_of_ours() -> None:
    Path("vit_digits.yaml").write_text(TEXT)
    config = CommandLine(["recipe=vit_digits.yaml"]).check()
    assert config is not None and config.lora.rank == 3


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("recipe=mi.yaml", "recipe=mi.yaml: there is no such file. Did you mean 'my.yaml'?"),
        ("recipe=my.yml", "recipe=my.yml: is no recipe's file: give one that ends in .yaml"),
        ("recipe=a,b.yaml", "give the file one of letters"),
        ("recipe=resnet_digits.yaml", "begins with itself; give the file another name"),
        ("recipe=cut.yaml", "recipe=cut: "),
    ],
)
def test_mistakes(word: str, told: str) -> None:
    for name in ("my.yaml", "a,b.yaml", "resnet_digits.yaml"):
        Path(name).write_text(TEXT)
    Path("cut.yaml").write_text("lora: [")
    with pytest.raises(ConfigError) as caught:
        CommandLine([word]).check()
    assert told in str(caught.value)
    assert len(caught.value.problems) == 1


def test_its_options_are_completed() -> None:
    Path("my.yaml").write_text(TEXT)
    line = ["lora-lightning", "train", "recipe=my.yaml"]
    assert "model.name=" in complete([*line, "model."])
    assert "model.depth=" in complete([*line, "model.d"]) and "data.domain=" in complete([*line, "data."])


def test_a_run_goes_on_with_it_unless_it_calls_something(tmp_path: Path) -> None:
    Path("my.yaml").write_text(TEXT)
    Path("train.py").write_text("")  # what lies beside is not asked
    hydra = Path("run", ".hydra")
    hydra.mkdir(parents=True)
    (hydra / "overrides.yaml").write_text("[recipe=my, lora.alpha=3]")
    source = {"provider": "command-line", "schema": "one-recipe", "path": str(tmp_path / "my.yaml")}
    runtime = {"cwd": str(tmp_path), "config_sources": [source]}
    (hydra / "hydra.yaml").write_text(yaml.safe_dump({"hydra": {"runtime": runtime}}))
    assert resumed(["resume=run"])[:2] == [f"recipe={tmp_path / 'my.yaml'}", "lora.alpha=3"]
    assert "lora.alpha=3" in resumed(["resume=run", "recipe=vit_digits"])
    Path("my.yaml").write_text(TEXT + "model:\n  a: {_target_: os.system}\n")
    with pytest.raises(ConfigError, match=r"it names model\.a\._target_=os\.system.*If the recipe is yours"):
        resumed(["resume=run"])
    assert "recipe=my.yaml" in resumed(["resume=run", "recipe=my.yaml"])
