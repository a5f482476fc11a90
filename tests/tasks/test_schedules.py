"""Schedules against torch's own, at their ends, and in a fit whose end is not known."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import lora_lightning as ll
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.optim import optimizer_of
from lora_lightning.tasks.optim_config import OptimConfig, ScheduleConfig
from lora_lightning.tasks.schedules import schedule_of

STEPS = 100


def factors(steps=STEPS, **options):
    factor = schedule_of(ScheduleConfig(**options), steps)
    return [factor(step) for step in range(steps)]


def torchs(make, steps=STEPS, lr=1.0):
    """The rates that a scheduler of torch's gives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_torchs_with_a_linear_climb_before_it(floor):
    def make(optimizer):
        climb = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 9)  # as many steps of equal size from a tenth
        fall = lr_scheduler.CosineAnnealingLR(optimizer, 90, floor)
        return lr_scheduler.SequentialLR(optimizer, [climb, fall], [10])

    assert factors(floor=floor) == pytest.approx(torchs(make), abs=1e-12)


def test_the_rate_climbs_linearly_and_falls_to_nearly_nothing():
    rates = factors()
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert schedule_of(ScheduleConfig(), STEPS)(STEPS) == pytest.approx(0)


@pytest.mark.parametrize(("steps", "warmup"), [(100, None), (37, 0.1), (100, 0.5)])
def test_onecycle_is_torchs(steps, warmup):
    share = 0.3 if warmup is None else warmup
    wanted = torchs(lambda o: lr_scheduler.OneCycleLR(o, 1.0, steps, pct_start=share), steps - 1)
    found = factors(steps, name="onecycle", warmup=warmup)
    assert found[:-1] == pytest.approx(wanted, rel=1e-9)
    assert found[-1] == pytest.approx(1 / 250_000)


def test_wsd_halves_in_equal_times_at_the_end():
    rates = factors(1000, name="wsd", floor=2**-5)
    assert rates[99:900] == [1.0] * 801
    fall = rates[900:]
    assert fall[::20] == pytest.approx([0.5**i for i in range(5)])
    assert schedule_of(ScheduleConfig(name="wsd"), 1000)(1000) == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["cosine", "constant", "onecycle", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_shortest_fits_have_rates(name, steps):
    assert all(0 <= rate <= 1 for rate in factors(steps, name=name))
    assert factors(steps, name=name, warmup=0)[0] == pytest.approx(1.0)


def test_constant_without_warmup_needs_no_end():
    factor = schedule_of(ScheduleConfig(name="constant", warmup=0), float("inf"))
    assert {factor(step) for step in range(5)} == {1.0}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "cosin"}, "Did you mean 'cosine'"),
        ({"warmup": 1}, "warmup=1"),
        ({"warmup": "10%"}, "warmup='10%'"),
        ({"name": "onecycle", "floor": 0.1}, "floor=0.1: onecycle ends where it is defined to"),
        ({"name": "wsd", "floor": 0}, "never to 0"),
        ({"name": "wsd", "warmup": 0.5, "decay": 0.6}, "give 0.5 or less"),
        ({"decay": 0}, "decay=0"),
    ],
)
def test_bad_options_are_told(options, match):
    with pytest.raises(ConfigError, match=match):
        ScheduleConfig(**options)
    (problem,) = OptimConfig.problems({"schedule": options})
    assert problem.startswith("schedule.")


def test_a_schedule_goes_on_where_it_was():
    config = OptimConfig(schedule={"name": "wsd"})

    def made():
        torch.manual_seed(0)
        return optimizer_of([{"name": "a", "params": [nn.Parameter(torch.zeros(1))]}], config, 20)

    whole, rates = made(), []
    for step in range(20):
        if step == 12:
            state = whole[0].state_dict(), whole[1].state_dict()
        rates.append(whole[0].param_groups[0]["lr"])
        whole[0].step(), whole[1].step()
    again = made()
    for one, given in zip(again, state, strict=True):
        one.load_state_dict(given)
    for rate in rates[12:]:
        assert again[0].param_groups[0]["lr"] == rate
        again[0].step(), again[1].step()


@pytest.mark.parametrize("options", [{}, {"name": "constant"}, {"name": "wsd", "warmup": 0.2}, {"warmup": 0}])
def test_the_rate_climbs_again_after_each_restart(options):
    """From nothing to where it would be, in the share of a cycle that the warm-up is of the whole."""
    plain, config = factors(**options), ScheduleConfig(**options)
    factor = schedule_of(config, STEPS, restarts=3)
    warmup = {"cosine": 0.1, "constant": 0.1}.get(config.name) if config.warmup is None else config.warmup
    climb = round(25 * warmup)
    for step in range(STEPS):
        share = min(1, (step % 25 + 1) / climb) if step >= 25 and climb else 1
        assert factor(step) == pytest.approx(share * plain[step]), step
    assert climb in (0, 2, 5)


def test_restarts_are_those_of_the_adapted_module():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    config = OptimConfig(lr=1.0, schedule={"name": "constant", "warmup": 0.2})
    for restarts, wanted in ((0, 1.0), (1, 1 / 4)):
        ll.inject(
            module, ll.LoRAConfig(rank=2, restarts=restarts, target_modules=["0"], modules_to_save=None)
        )
        groups = [{"name": "a", "params": ll.lora_parameters(module)}]
        _, scheduler = optimizer_of(groups, config, 40, module=module)
        assert scheduler.lr_lambdas[0](20) == pytest.approx(wanted)
        ll.eject(module)
