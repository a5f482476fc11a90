"""The page of the public names has each, and each says what its parameters are."""

import inspect
import re

import pytest
from pages import DOCS, config

import lora_lightning as ll

LISTED = re.findall(
    r"^::: lora_lightning\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE
)
HIDDEN = config()["plugins"][1]["mkdocstrings"]["handlers"]["python"]["options"]["filters"]
ENTRY = re.compile(r"^ {4}(\*{0,2}\w+):", re.MULTILINE)


def documented(doc: str) -> set[str]:
    """What the sections Args and Attributes of a docstring name."""
    parts = re.findall(r"^(?:Args|Attributes):\n((?:(?: .*)?(?:\n|$))*)", doc, re.MULTILINE)
    return {name.lstrip("*") for part in parts for name in ENTRY.findall(part)}


def undocumented(function: object, doc: str) -> list[str]:
    """Parameters that a docstring leaves out; those behind `**options` may stand in its text."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    have = documented(doc)
    have |= set(re.findall(r"`(\w+)`", doc.partition("**options:")[2]))
    return [name for name in names if name not in have]


def shown(cls: type) -> dict[str, object]:
    """A class's own methods that the page shows: those with a docstring that the filters leave."""
    patterns = [rule.removeprefix("!") for rule in HIDDEN]
    own = {name: getattr(value, "__func__", value) for name, value in vars(cls).items()}
    return {
        name: value
        for name, value in own.items()
        if inspect.isfunction(value) and value.__doc__ and not any(re.search(p, name) for p in patterns)
    }


def test_every_public_name_is_there_once():
    assert sorted(LISTED) == sorted(ll.__all__)


@pytest.mark.parametrize("name", ll.__all__)
def test_its_docstring_names_every_parameter(name):
    value = getattr(ll, name)
    doc = inspect.getdoc(value)
    assert doc and doc.partition("\n")[0].strip()
    if not inspect.isclass(value):
        assert not undocumented(value, doc)
        return
    if value.__init__ not in (Exception.__init__, ValueError.__init__):
        assert not undocumented(value, doc)
    left_out = {method: undocumented(f, inspect.getdoc(f) or "") for method, f in shown(value).items()}
    assert not {method: names for method, names in left_out.items() if names}


def test_what_is_left_out_is_noticed():
    def function(model, folder, **options):
        """Do it.

        Args:
            model: a network.
            **options: `rank`.
        """

    assert undocumented(function, inspect.getdoc(function)) == ["folder"]
