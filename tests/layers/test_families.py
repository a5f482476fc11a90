"""The promises of an adapted layer, for every family and setting, against independent maths.

Those of one case are checked on one model, one after the other as in its life; the function that fails says
which. What is checked on typical cases alone: test_families_kept.py, test_families_steps.py.
"""

import torch
from families import (
    ATTENTION,
    CASES,
    GENERAL,
    RECURRENT,
    TYPICAL,
    Model,
    adapted,
    base_model,
    check_merging,
    config,
    equal,
    every_case,
    fill,
    in_mode,
    loss,
    reference,
    reference_run,
    run,
    same_flags,
)

import lora_lightning as ll

MODES = (True, False)  # train, eval
WITH_MODES = {*ATTENTION, *RECURRENT, *GENERAL}  # in which the base layer itself may do something else


@every_case
def test_outputs_and_gradients_are_those_of_the_effective_weight(name):
    model, inputs = adapted(name, torch.float64), CASES[name].inputs(torch.float64)
    parameters = ll.lora_parameters(model)
    plain, weights = reference(name, model)
    for train in MODES if name in WITH_MODES else MODES[:1]:
        got = run(model.train(train), inputs)
        wanted = reference_run(plain, weights, inputs, train)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        gradients = torch.autograd.grad(loss(got), parameters)
        expected = torch.autograd.grad(loss(wanted), parameters, retain_graph=True)
        torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)


@every_case
def test_the_life_of_an_adapted_layer(name):
    """In float32: injected, filled, off and on, merged and unmerged, trained."""
    model = base_model(name)
    ll.inject(model, config(name))
    base, inputs = same_flags(name, model), CASES[name].inputs()
    with torch.no_grad():
        bases = {train: run(in_mode(base, train), inputs) for train in MODES}
    check_that_nothing_changes_at_injection(model, base, inputs, bases)
    fill(model)
    for train in MODES:
        check_that_off_is_the_base(model.train(train), inputs, bases[train])
    if name in TYPICAL:
        check_outputs_without_gradients(name, model, inputs)
    check_merging(model.eval(), inputs, 1e-5)
    ll.merge(model)
    check_that_off_is_the_base(model, inputs, bases[False])
    ll.unmerge(model)
    check_that_training_changes_the_updates_alone(model.train(), inputs)
    check_that_off_is_the_base(model, inputs, bases[True])


def check_that_nothing_changes_at_injection(model: Model, base: Model, inputs: tuple, bases: dict) -> None:
    for train in reversed(MODES):
        with torch.no_grad():
            assert equal(run(model.train(train), inputs), bases[train])
    for one, other in zip(run(model, inputs), run(in_mode(base, True), inputs), strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@torch.no_grad()
def check_that_off_is_the_base(model: Model, inputs: tuple, base: list[torch.Tensor]) -> None:
    changed = run(model, inputs)
    assert not equal(changed, base)
    with ll.adapters_off(model):
        assert equal(run(model, inputs), base)
    assert equal(run(model, inputs), changed)


@torch.no_grad()  # where attention and its encoder layer take their fused path
def check_outputs_without_gradients(name: str, model: Model, inputs: tuple) -> None:
    plain, weights = reference(name, model)
    for train in MODES:
        wanted = reference_run(plain, weights, inputs, train)
        for one, other in zip(run(model.train(train), inputs), wanted, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def check_that_training_changes_the_updates_alone(model: Model, inputs: tuple) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    loss(run(model, inputs)).backward()
    optimizer.step()
    after = model.state_dict()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) == (".lora." not in key), key
