"""OptimConfig: its problems, and the optimizer and the schedule that it stands for."""

import math

import pytest
import torch
from small import Net

from lora_lightning import param_groups
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.optim import optimizer_of
from lora_lightning.tasks.optim_config import OptimConfig


def test_good_options_have_no_problems():
    assert OptimConfig.problems({}) == []
    good = {"lr": 1, "head_lr": 1e-2, "weight_decay": 0, "schedule": {"warmup": 0}, "betas": [0.9, 0.95]}
    assert OptimConfig.problems(good) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0),
        ("lr", -1e-3),
        ("lr", "fast"),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", True),
        ("lr", None),
        ("head_lr", 0),
        ("head_lr", [1e-3]),
        ("weight_decay", -0.1),
        ("weight_decay", None),
        ("weight_decay", False),
        ("layer_decay", 0),
        ("name", "adamx"),
        ("schedule", "cosine"),
        ("betas", 0.9),
        ("betas", [0.9]),
        ("betas", [0.9, 1.0]),
        ("betas", "0.9"),
        ("betas", ["a", "b"]),
    ],
)
def test_a_bad_value_is_one_problem_that_names_it(option, value):
    (problem,) = OptimConfig.problems({option: value})
    assert problem.startswith(f"{option}=")
    with pytest.raises(ConfigError):
        OptimConfig(**{option: value})


def test_all_problems_come_together_with_the_near_miss():
    problems = OptimConfig.problems({"lr": -1, "momentum": 2, "weight_decy": 0.1})
    assert len(problems) == 3
    assert "Did you mean 'weight_decay'" in problems[0]


def test_betas_from_yaml_become_a_plain_tuple():
    assert OptimConfig(betas=[0.9, 0.95]).to_dict()["betas"] == (0.9, 0.95)


def test_each_group_keeps_its_own_peak():
    model = Net()
    config = OptimConfig(lr=1e-3, head_lr=1e-2)
    groups = param_groups(model, lr=1e-3, head_lr=1e-2)
    optimizer, scheduler = optimizer_of(groups, config, total_steps=20)
    peaks = [0.0] * len(optimizer.param_groups)
    for _ in range(20):
        peaks = [max(p, g["lr"]) for p, g in zip(peaks, optimizer.param_groups, strict=True)]
        optimizer.step()
        scheduler.step()
    assert peaks == pytest.approx([1e-3, 1e-3, 1e-2, 1e-2])
    assert torch.tensor([g["lr"] for g in optimizer.param_groups]).max() < 1e-9


def test_a_fused_step_is_the_usual_one():
    first, second = Net(), Net()
    second.load_state_dict(first.state_dict())
    for model, fused in ((first, True), (second, False)):
        optimizer, _ = optimizer_of(param_groups(model, weight_decay=0.1), OptimConfig(), 20, fused)
        for step in range(3):
            for i, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (i - step))
            optimizer.step()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_of_a_run_that_was_not_fused_does_not_say_how_this_one_is(fused):
    model = Net()
    groups = param_groups(model)
    written, _ = optimizer_of(groups, OptimConfig(), 20, not fused)
    optimizer, _ = optimizer_of([dict(group) for group in groups], OptimConfig(), 20, fused)
    optimizer.load_state_dict(written.state_dict())
    assert {bool(group["fused"]) for group in optimizer.param_groups} == {fused}
