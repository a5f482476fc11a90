"""Many bad command lines: each gives one message that names every mistake, and exit code 2."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lightning.app.application import main
from lora_lightning.app.compose import shipped
from lora_lightning.app.options import checks_in
from lora_lightning.app.overriding import leaves
from lora_lightning.utils.marks import show

CONFIG = shipped().compose_groups(())
CHECKS = checks_in(CONFIG)  # type: ignore[arg-type]
KEYS = [key for key in leaves(CONFIG) if not key.startswith(("logger.", "callbacks."))]  # type: ignore[arg-type]
GROUPS = shipped().groups()
NAMES = {part for key in KEYS for part in key.split(".")} | set(GROUPS)
VALUES: list[Any] = [
    -3,
    -1,
    0,
    0.5,
    1.5,
    7,
    2**40,
    True,
    None,
    "zebra",
    "16 bits",
    "-",
    [],
    [1, "x"],
    {"a": 1},
    "",
]
LORA = {
    "rank": (0, -1, 2.5, "eight", None, True, []),
    "alpha": (0, -2, "x", [1]),
    "dropout": (1, -0.1, "half", None),
    "target_modules": ([], 3, None, [1]),
    "exclude_modules": ([], 3),
    "init": ("defaul", 1, None),
    "use_dora": ("maybe", 1, None),
    "train_norm": ("frozn", True),
    "rank_pattern": (3, {"qkv": 0}, {"qkv": "x"}, [1]),
}
OPTIM = {
    "lr": (0, -1e-3, "fast", None),
    "head_lr": (0, "x"),
    "weight_decay": (-1, "x", None),
    "name": ("adamx", 1, None),
    "layer_decay": (0, 2, "x"),
    "betas": (0.9, [0.9], [0.9, 1]),
}
SCHEDULE = {
    "name": ("wds", None),
    "warmup": (1, -0.5, "x"),
    "floor": (1, -0.5, "x"),
}
typos = st.text(string.ascii_lowercase + "_", min_size=3, max_size=9).filter(lambda t: t not in NAMES)


def write(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) and not value.isalnum() else show(value)


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[str, str, str]:
    """A known option with a letter lost, doubled or changed."""
    key = draw(st.sampled_from(KEYS))
    head, dot, name = key.rpartition(".")
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(["", name[at] * 2, draw(st.sampled_from("xqzj"))]))
    wrong = name[:at] + letter + name[at + 1 :]
    if wrong in NAMES or not wrong or not wrong[0].isalpha():
        wrong = f"{name}qq"
    return key, f"{head}{dot}{wrong}=1", f"{head}{dot}{wrong}"


@st.composite
def unknown(draw: st.DrawFn) -> tuple[str, str, str]:
    """An invented option, an invented group, or an option of an invented group."""
    word = draw(typos)
    key = draw(st.sampled_from([word, f"{word}.rank", f"lora.{word}", f"trainer.{word}"]))
    return key, f"{key}={draw(st.integers(0, 9))}", key


@st.composite
def missing_choice(draw: st.DrawFn) -> tuple[str, str, str]:
    group = draw(st.sampled_from(GROUPS))
    name = draw(typos.filter(lambda t: t not in shipped().choices(group)))
    return group, f"{group}={name}", f"{group}={name}"


@st.composite
def out_of_range(draw: st.DrawFn) -> tuple[str, str, str]:
    """A known option with a value that its rule refuses."""
    key = draw(st.sampled_from([k for k in KEYS if k in CHECKS and k != "data.seed"]))
    bad = [v for v in VALUES if not CHECKS[key].allows(v) and v != ""]
    if not bad:
        bad = [{"a": 1}]
    return key, f"{key}={write(draw(st.sampled_from(bad)))}", key


@st.composite
def bad_lora_or_optim(draw: st.DrawFn) -> tuple[str, str, str]:
    group, table = draw(st.sampled_from([("lora", LORA), ("optim", OPTIM), ("schedule", SCHEDULE)]))
    name = draw(st.sampled_from(sorted(table)))
    return f"{group}.{name}", f"{group}.{name}={write(draw(st.sampled_from(table[name])))}", f"{group}.{name}"


@st.composite
def malformed(draw: st.DrawFn) -> tuple[str, str, str]:
    key = draw(st.sampled_from(KEYS))
    shape = draw(
        st.sampled_from(["{k}", "{k}=[1", "{k}={{a", "--{k}=1", "{k}=1,2", "{k}=${{nowhere}}", "{k}=(|)"])
    )
    return key, shape.format(k=key), key


mistakes = st.one_of(
    misspelt(), unknown(), missing_choice(), out_of_range(), bad_lora_or_optim(), malformed()
)


def apart(found: list[tuple[str, str, str]]) -> bool:
    """No mistake hides another: none sets what another names, none takes a group's options away."""
    roots = [key.split(".")[0] if "." not in key else key for key, _, _ in found]
    return len(set(roots)) == len(roots)


QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=40, **QUIET)
@given(found=st.lists(mistakes, min_size=1, max_size=8).filter(apart))
def test_every_mistake_is_named_in_one_message(
    found: list[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    check(found, capsys)


@pytest.mark.slow
@settings(max_examples=1000, **QUIET)
@given(found=st.lists(mistakes, min_size=1, max_size=4).filter(apart))
def test_every_mistake_of_a_thousand_lines_is_named(
    found: list[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    check(found, capsys)


def check(found: list[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([word for _, word, _ in found])
    out, message = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert message.count("in the configuration:") == 1
    assert "Traceback" not in message
    assert 'File "' not in message
    lines = [line for line in message.splitlines() if line.startswith("  - ")]
    assert len(lines) + 1 == len(message.strip().splitlines())
    for _, _, named in found:
        assert any(line.lstrip(" -").startswith((named, f"+{named}", f"--{named}")) for line in lines), named
