"""An option is declared once, in its class: Python, Hydra and the command line refuse a bad value alike."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_lightning.app.command_line import CommandLine
from lora_lightning.app.completion import complete
from lora_lightning.app.options import options_in
from lora_lightning.app.static_hints import hint_of
from lora_lightning.app.static_modules import tree_of
from lora_lightning.app.static_signatures import static_checks
from lora_lightning.errors import ConfigError
from lora_lightning.files.allowed import BUILDERS
from lora_lightning.utils.checks import checks_of

GUIDE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
# The class of the guide's example, and what it says of it.
CLASS = next(
    block for block in re.findall(r"```python[^\n]*\n(.*?)```", GUIDE, re.S) if "class BlurredDigits" in block
)
LINES = re.findall(r"^  - (data\.\w+=\w+: .*)", GUIDE, re.M)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's, and choices of the group `data` with none of its options and with bad ones."""
    (tmp_path / "blurred.py").write_text(CLASS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "blurred.yaml").write_text("_target_: blurred.BlurredDigits\n")
    (tmp_path / "data" / "wrong.yaml").write_text("_target_: blurred.BlurredDigits\nblur: 0\nedge: sof\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "blurred", raising=False)
    return tmp_path


def told(line: str, folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        CommandLine([*line.split(), f"--config-dir={folder}"]).check()
    return caught.value.problems


def test_three_ways_refuse_a_bad_value_with_the_same_line(folder: Path) -> None:
    assert len(LINES) == 2
    assert told("data=blurred data.blur=0 data.edge=sof", folder) == LINES
    assert told("data=wrong", folder) == LINES
    assert "blurred" not in sys.modules  # its source was enough
    module = importlib.import_module("blurred")
    with pytest.raises(ConfigError) as caught:
        module.BlurredDigits(blur=0, edge="sof")
    assert caught.value.problems == [line.removeprefix("data.").replace("=sof", "='sof'") for line in LINES]


def test_it_is_completed_at_once(folder: Path) -> None:
    line = f"lora-lightning train --config-dir={folder} data=blurred"
    assert complete([*line.split(), "data."]) == ["data.blur=", "data.edge="]
    assert complete([*line.split(), "data.edge="]) == ["data.edge=hard", "data.edge=soft"]


def test_what_no_file_sets_needs_no_plus(folder: Path) -> None:
    words = [f"--config-dir={folder}", "data=blurred", "lora.implementation=reference"]
    one = CommandLine([*words, "data.blur=7"])
    config = one.check()
    assert config is not None
    assert (config.data.blur, config.lora.implementation) == (7, "reference")
    assert {"++data.blur=7", "++lora.implementation=reference"} < set(one.for_hydra())
    several = CommandLine(["-m", *words, "data.blur=7,8"])
    assert several.check() is None
    assert {"++data.blur=7,8", "++lora.implementation=reference"} < set(several.for_hydra())
    assert "lora.rank=${seed}" in CommandLine(["lora.rank=${seed}"]).words
    assert told("data=blurred data.blurr=1", folder) == [
        "data.blurr=1: there is no such option. Did you mean 'data.blur'? Options of data: blur, edge."
    ]


def test_what_the_source_does_not_tell_the_class_tells_before_anything_is_built() -> None:
    with pytest.raises(ConfigError) as caught:
        CommandLine(["recipe=vit_cifar", "data.augment.auto_augment=randaug"]).check()
    told = "data.augment.auto_augment=randaug: give trivialaugment or a policy of timm"
    assert caught.value.problems[0].startswith(told)


TARGETS = sorted(name for names in BUILDERS.values() for name in names)


@pytest.mark.parametrize("target", TARGETS)
def test_the_source_tells_what_the_class_does(target: str) -> None:
    """Or less, where a check asks a library; never something else."""
    from hydra.utils import get_object

    static, true = static_checks(target), checks_of(get_object(target))
    assert static.keys() <= true.keys()
    for name, check in static.items():
        assert (check.allowed, check.names, check.null) == (
            true[name].allowed,
            true[name].names,
            true[name].null,
        )


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_declared_is_checked_in_python(target: str) -> None:
    """All options are wrong at once, and each is told."""
    from hydra.utils import get_object

    found = get_object(target)
    wrong = dict.fromkeys(checks_of(found), object())
    others = {
        name: ["_", "a"] if name == "vocabulary" else None
        for name, parameter in inspect.signature(found).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    with pytest.raises(ConfigError) as caught:
        found(**others | wrong)
    assert {problem.partition("=")[0] for problem in caught.value.problems} == set(wrong)


@pytest.mark.parametrize("target", TARGETS)
def test_every_option_has_its_line(target: str) -> None:
    """What an option means stands once, in the docstring of what has it (or of what it is handed on to)."""
    from hydra.utils import get_object

    found = get_object(target)
    texts = [inspect.getdoc(c) or "" for c in (found.__mro__ if isinstance(found, type) else (found,))]
    module = sys.modules[found.__module__]
    texts += [inspect.getdoc(v) or "" for v in vars(module).values() if inspect.isclass(v)]
    lacking = [
        name for name in options_in("", target) if not any(f"{name}:" in t or f"{name}," in t for t in texts)
    ]
    assert lacking == []


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.system('touch touched')",
        "x = __import__('os').system('touch touched')",
        "from lora_lightning.utils.marks import Check\nx = Check('a', print)",
        "x = 10 ** 10 ** 10",
        "x = 'a' * 10**12",
        "x = x",
        "from cut import x",
        "x, y = y, x",
        "x = [*x]",
        "x = {**{}}",
        "from lora_lightning.utils.marks import os as x",
        "from lora_lightning.utils.marks import at_least\nx = at_least('a', 3, 4, 5)",
    ],
)
def test_nothing_else_is_evaluated(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cut.py").write_text(f"from typing import Annotated\n{text}\ny: Annotated[int, x] = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    tree = tree_of("cut")
    assert tree is not None
    assert hint_of("cut", tree.body[-1].annotation) is Any  # type: ignore[attr-defined]
    assert not (tmp_path / "touched").exists()


def test_a_reference_is_checked_where_it_leads() -> None:
    with pytest.raises(ConfigError) as caught:
        CommandLine(["seed=-1"]).check()  # data.seed is ${seed}
    assert caught.value.problems == ["seed=-1: give a whole number from 0 to 4294967295."]


def test_a_page_of_help_may_leave_open_what_a_run_is_given() -> None:
    CommandLine(["recipe=fcos_coco", "data=coco_format", "--help"]).check()
    with pytest.raises(ConfigError, match=r"data\.train_images=null: give a folder"):
        CommandLine(["recipe=fcos_coco", "data=coco_format"]).check()


def test_a_class_beside_the_recipe_says_what_needs_no_plus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # find_user_modules adds to it
    monkeypatch.delitem(sys.modules, "blurred_beside", raising=False)
    (tmp_path / "blurred_beside.py").write_text(CLASS)
    recipe = tmp_path / "beside.yaml"
    own = "data: {_target_: blurred_beside.BlurredDigits}"
    recipe.write_text(f"# @package _global_\ndefaults: [{{override /data: null}}]\n{own}\n")
    config = CommandLine([f"recipe={recipe}", "data.blur=7"]).check()
    assert config is not None and config.data.blur == 7
