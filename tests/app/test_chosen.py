"""Callbacks, optimizers, schedules and speedups by a word each."""

from __future__ import annotations

import re

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from small import adapted, mlp

from lora_lightning.app.build import compared_config, optim_config
from lora_lightning.app.command_line import CommandLine
from lora_lightning.app.completion import complete
from lora_lightning.app.compose import shipped
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.optim_config import FLOOR, WARMUP, ScheduleConfig
from lora_lightning.tasks.optimizers import KINDS, class_of, missing_library, options_for
from lora_lightning.trainer.ema import EMA
from lora_lightning.trainer.speedups import Speedups

ALWAYS = ["checkpoint", "last", "preemption", "learning_rate"]


def composed(*words: str):
    return CommandLine(list(words)).check()


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ([], []),
        (["callbacks=ema"], ["ema"]),
        (["callbacks=[ema,early_stopping]"], ["ema", "early_stopping"]),
        (["callbacks=[early_stopping]", "recipe=fcos_shapes"], ["early_stopping"]),
    ],
)
def test_callbacks_are_added_to_those_of_every_run(words: list[str], more: list[str]) -> None:
    assert list(composed(*words).callbacks) == [*ALWAYS, *more]


def test_each_choice_is_a_callback_whose_options_are_checked() -> None:
    for name in shipped().choices("callbacks"):
        node = composed(f"callbacks={name}").callbacks[name]
        given = {"monitor": "val/acc", "mode": "max"} if "monitor" in node else {}
        assert isinstance(instantiate(node, **given), Callback), name
    ema = instantiate(composed("callbacks=ema", "callbacks.ema.decay=0.99").callbacks.ema)
    assert isinstance(ema, EMA) and ema.decay == 0.99


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "callbacks=[ema,early_stoping]",
            "callbacks=[ema,early_stoping]: give one of .* or a list .*'early_stopping'",
        ),
        ("optim.rate_scale=2", r"optim\.rate_scale=2: there is no such option"),
        ("callbacks=default", "callbacks=default: give one of"),
        ("speedups.compile=fast", "speedups.compile=fast: give true, false, or a mode"),
        ("speedups.channels_last=1", "speedups.channels_last=1: give true or false"),
        ("+optim.schedule=wsd", "optim.schedule: is set by the application: leave it out; use schedule=NAME"),
    ],
)
def test_wrong_words(word: str, told: str) -> None:
    words = [word, "callbacks=ema"] if word.startswith("speed") else [word]
    with pytest.raises(ConfigError) as caught:
        composed(*words)
    (problem,) = caught.value.problems
    assert re.match(told.replace("[", r"\["), problem), problem


def test_every_schedule_and_its_own_values() -> None:
    """What a file says is what the class takes where it is given nothing."""
    assert shipped().choices("schedule") == tuple(sorted(WARMUP))
    for name in WARMUP:
        found = optim_config(composed(f"schedule={name}")).rate_schedule
        assert (found.name, found.warmup) == (name, WARMUP[name])
        assert found.floor == FLOOR.get(name) and found.decay == ScheduleConfig().decay


OPTIMIZERS = [
    pytest.param(
        name, marks=[pytest.mark.xfail(raises=ConfigError, strict=True)] if missing_library(name) else []
    )
    for name in KINDS
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_and_its_own_values(name: str) -> None:
    """What a file says is what the class takes where it is given nothing, at the rate of the method."""
    config = composed(f"optim={name}", "rates.lora=1e-3", "rates.full=1e-4", "optim.head_lr=0.5")
    found = optim_config(config)
    scale = config.optim.get("rate_scale", 1)
    assert (found.name, found.lr) == (name, pytest.approx(1e-3 * scale))
    assert optim_config(compared_config(config, "full", "x")).lr == pytest.approx(1e-4 * scale)
    assert composed(f"optim={name}", "optim.lr=0.2").optim.lr == 0.2
    parameter = [torch.nn.Parameter(torch.zeros(2))]
    module = {"module": adapted(mlp)} if KINDS[name].for_updates else {}
    filled = class_of(name)(parameter, **options_for(name, vars(found)), **module, lr=1)
    plain = class_of(name)(parameter, **KINDS[name].given, **module, lr=1)
    assert filled.defaults == plain.defaults
    assert getattr(filled, "damping", None) == getattr(plain, "damping", None)


def test_what_is_for_updates_is_for_methods_that_have_some() -> None:
    """In a comparison the others train without it; a run without such a method refuses it."""
    config = composed("optim.lora_plus=16", "compare=[full,peft]")
    assert optim_config(config).lora_plus == 16
    others = {m: optim_config(compared_config(config, m, "x")).lora_plus for m in ("peft", "full")}
    assert others == {"peft": 16, "full": None}
    config = composed("optim=scaled_adamw", "optim.damping=1e-3", "compare=[full]")
    assert (optim_config(config).name, optim_config(config).damping) == ("scaled_adamw", 1e-3)
    full = optim_config(compared_config(config, "full", "x"))
    assert (full.name, full.damping) == ("adamw", None)
    for words, told in (
        (["optim.lora_plus=16"], r"optim\.lora_plus=16: method=full does not use it"),
        (["optim=scaled_adamw"], r"optim\.name=scaled_adamw: method=full has no updates; give optim=adamw"),
        (
            ["optim=muon", "+optim.lora_plus=4", "method=lora"],
            r"optim\.lora_plus=4: muon scales its steps by",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            composed("method=full", "compare=[]", *words)
        (problem,) = caught.value.problems
        assert re.match(told, problem), problem


def test_speedups_are_off_and_on() -> None:
    assert vars(instantiate(composed().speedups)) == vars(Speedups())
    on = instantiate(composed("speedups.compile=true", "speedups.gradient_checkpointing=true").speedups)
    assert on.compile is True and on.gradient_checkpointing


def test_the_options_of_a_list_of_callbacks_are_completed() -> None:
    line = ["lora-lightning", "train", "callbacks=[early_stopping,ema]"]
    assert complete([*line, "callbacks.ema."]) == ["callbacks.ema.decay=", "callbacks.ema.warmup="]
    assert complete([*line[:2], "callbacks=e"]) == ["callbacks=early_stopping", "callbacks=ema"]
    assert "speedups.channels_last=true" in complete([*line, "speedups.channels_last="])
