"""Options checked where they are declared: in functions, classes and dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from lora_lightning.errors import ConfigError
from lora_lightning.utils.checks import Options, checks_of, fields_of, options_of, problems, require
from lora_lightning.utils.marks import Null, above, at_least, one_of


@dataclass
class Rates(Options):
    """Options of a test."""

    owner = "the rates"

    lr: Annotated[float, above(0)] = 1.0
    head_lr: Annotated[float | None, above(0), Null("lr")] = None

    @classmethod
    def plain(cls, name: str, value: Any) -> Any:
        return float(value) if value == "1e-3" else value


class Base:
    def __init__(
        self, size: Annotated[int, at_least(1)] = 1, *, kind: Annotated[str, one_of("a", "b")] = "a"
    ) -> None:
        require(Base, locals(), ["size and kind: not together."] if size == 3 else ())


class Inherits(Base):
    pass


def built(
    name: str,
    rates: Annotated[Rates | Mapping[str, Any] | None, fields_of(Rates)] = None,
    width: Missing = 3,  # type: ignore[name-defined]  # noqa: F821  # a name for type checkers alone
    **more: int,
) -> None:
    require(built, locals())


@options_of(Base)
def made(name: str, size: str = "", **options: Any) -> None:
    require(made, {"name": name, "size": size, **options})


def refused(call: Any, *values: Any, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*values, **options)
    return caught.value.problems


@pytest.mark.parametrize("kind", [Base, Inherits])
def test_a_class_tells_all_that_is_wrong(kind: type) -> None:
    kind(2, kind="b")
    assert refused(kind, 0, kind="c") == [
        "size=0: give a whole number of at least 1.",
        "kind='c': give one of a, b.",
    ]
    assert refused(kind, 3) == ["size and kind: not together."]


def test_options_within_an_option_and_what_cannot_be_read() -> None:
    built("x", {"lr": "1e-3"}, more=3)
    built("x", Rates(2.0))
    assert refused(built, "", {"lr": 0, "hed_lr": 1}) == [
        "name='': give a text.",
        "rates.hed_lr=1 is not an option of the rates. Did you mean 'head_lr' or 'lr'? Options: lr, head_lr.",
        "rates.lr=0: give a number above 0.",
    ]
    assert refused(built, "x", 3) == ["rates=3: give a mapping of lr, head_lr, or null."]
    assert set(checks_of(built)) == {"name", "rates"}


def test_a_dataclass_checks_itself_and_others_before() -> None:
    assert Rates(lr="1e-3").lr == 1e-3  # type: ignore[arg-type]
    assert refused(Rates, -1.0, 0.0) == [
        "lr=-1.0: give a number above 0.",
        "head_lr=0.0: give a number above 0, or null for lr.",
    ]
    assert Rates.problems({"lr": "1e-3"}) == []
    assert Rates.problems({"lr": "fast"}, "optim.") == ["optim.lr=fast: give a number above 0."]
    assert problems(Rates, {"lr": 1, "unknown": 2}) == []


def test_a_function_with_the_options_of_a_class() -> None:
    made("x", size="large", kind="b")  # its own come first
    assert refused(made, "x", size="x", kind="c") == ["kind='c': give one of a, b."]
