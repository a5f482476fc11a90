"""OptimConfig: its problems, which parameters get which rate and decay, and every optimizer."""

import math

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.optim import head_parameters, optimizer_of, parameter_groups
from lora_lightning.tasks.optim_config import OptimConfig


class Net(nn.Module):
    """Like a timm model: a convolution, a norm and a head that get_classifier names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def get_classifier(self):
        return self.fc


def names(model, group):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in group["params"]]


def groups_of(model, **options):
    groups = parameter_groups(model, head_parameters(model), OptimConfig(**options))
    return {group["name"]: group for group in groups}


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


def test_full_fine_tuning_decays_matrices_alone_and_gives_the_head_its_rate():
    model = Net()
    groups = groups_of(model, lr=1e-3, head_lr=1e-2, weight_decay=0.05)
    assert {name: names(model, group) for name, group in groups.items()} == {
        "backbone": ["stem.weight", "conv.weight"],
        "backbone_no_decay": ["stem.bias", "conv.bias", "norm.weight", "norm.bias"],
        "head": ["fc.weight"],
        "head_no_decay": ["fc.bias"],
    }
    assert [group["lr"] for group in groups.values()] == [1e-3, 1e-3, 1e-2, 1e-2]
    assert [group["weight_decay"] for group in groups.values()] == [0.05, 0, 0.05, 0]


def test_lora_trains_undecayed_updates_and_the_head():
    model = Net()
    inject(model, LoRAConfig(rank=2))
    groups = groups_of(model, weight_decay=0.05)
    assert list(groups) == ["backbone_no_decay", "head", "head_no_decay"]
    assert all("lora_" in name for name in names(model, groups["backbone_no_decay"]))
    grouped = [p for group in groups.values() for p in group["params"]]
    assert len(grouped) == sum(p.requires_grad for p in model.parameters())
    assert {group["lr"] for group in groups.values()} == {1e-3}  # head_lr=None is lr


def test_the_order_is_that_of_the_parameters():
    first, second = groups_of(Net()), groups_of(Net())
    for a, b in zip(first.values(), second.values(), strict=True):
        assert [p.shape for p in a["params"]] == [p.shape for p in b["params"]]


def test_two_heads_and_none():
    model = Net()
    model.aux = nn.Linear(8, 4)
    model.get_classifier = lambda: (model.fc, model.aux)
    assert head_parameters(model) == {*model.fc.parameters(), *model.aux.parameters()}
    assert head_parameters(nn.Linear(2, 2)) == set()


def test_head_lr_without_a_head_and_a_frozen_model_are_refused():
    with pytest.raises(ConfigError, match=r"head_lr=0.01: no head trains in Linear"):
        groups_of(nn.Linear(2, 2), head_lr=0.01)
    with pytest.raises(ConfigError, match="no parameter of Net requires a gradient"):
        groups_of(Net().requires_grad_(False))


def test_each_group_keeps_its_own_peak():
    model = Net()
    config = OptimConfig(lr=1e-3, head_lr=1e-2)
    optimizer, scheduler = optimizer_of(
        parameter_groups(model, head_parameters(model), config), config, total_steps=20
    )
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
        optimizer, _ = optimizer_of(
            list(groups_of(model, weight_decay=0.1).values()), OptimConfig(), 20, fused
        )
        for step in range(3):
            for i, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (i - step))
            optimizer.step()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_of_a_run_that_was_not_fused_does_not_say_how_this_one_is(fused):
    model = Net()
    groups = list(groups_of(model).values())
    written, _ = optimizer_of(groups, OptimConfig(), 20, not fused)
    optimizer, _ = optimizer_of([dict(group) for group in groups], OptimConfig(), 20, fused)
    optimizer.load_state_dict(written.state_dict())
    assert {bool(group["fused"]) for group in optimizer.param_groups} == {fused}
