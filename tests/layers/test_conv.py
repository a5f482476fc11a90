"""Convolutions: the shapes of their factors, dropout on their branches, what they leave alone."""

import pytest
import torch
from families import CASES, CONV, TRANSPOSED, adapted, base_model, config, reference, run
from torch import nn

import lora_lightning as ll


@pytest.mark.parametrize(
    ("build", "A", "B"),
    [
        (lambda: nn.Conv1d(4, 6, 3), (3, 4, 3), (6, 3)),
        (lambda: nn.Conv2d(8, 6, (3, 2), groups=2), (2 * 3, 4, 3, 2), (6, 3)),
        (lambda: nn.Conv2d(6, 6, 3, groups=6), (3, 1, 3, 3), (6, 3)),  # across the channels
        (lambda: nn.Conv2d(5, 15, 3, groups=5), (3, 1, 3, 3), (15, 3)),
        (lambda: nn.Conv3d(4, 6, 2), (3, 4, 2, 2, 2), (6, 3)),
        (lambda: nn.ConvTranspose1d(4, 6, 3), (3, 4), (3, 6, 3)),
        (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2), (2 * 3, 4), (2 * 3, 3, 3, 3)),
    ],
)
def test_shapes_of_the_factors(build, A, B):
    model = nn.Sequential(build())
    settings = ll.LoRAConfig(rank=3, target_modules=["0"], modules_to_save=None)
    planned = ll.inject(model, settings)
    update = model[0].lora["default"]["weight"]
    assert update.lora_A.shape == A and update.lora_B.shape == B
    assert planned.trainable == update.lora_A.numel() + update.lora_B.numel()


@pytest.mark.parametrize(
    ("build", "side"),
    [
        (lambda: nn.Conv2d(8, 6, 3, groups=2), 3),  # each group makes 3 channels
        (lambda: nn.Conv2d(32, 32, 3, groups=32), 9),  # 32 × 9
        (lambda: nn.ConvTranspose2d(8, 64, 3, groups=2), 4),
        (lambda: nn.ConvTranspose2d(16, 16, 3, groups=16), 1),
    ],
)
def test_rank_is_bounded_by_the_matrix_of_a_group(build, side):
    named = {"target_modules": ["0"], "rank_pattern": {"0": side + 1}}
    with pytest.raises(ll.ConfigError, match=rf"smaller side, {side}, of 0: give at most {side}"):
        ll.plan(nn.Sequential(build()), ll.LoRAConfig(**named))
    for rank in (side, side + 1):
        plan = ll.plan(nn.Sequential(build()), ll.LoRAConfig(rank=rank, target_modules=["0"]))
        assert plan.layers[0].rank == side


@pytest.mark.parametrize("name", [n for n in {**CONV, **TRANSPOSED} if "dora" not in n])
def test_dropout_drops_entries_of_the_branchs_input(name, drops_alike):
    """y = f(x, W) + b + f(dropout(x), s·B·A)."""
    model, base = adapted(name, torch.float64, dropout=0.5), base_model(name, torch.float64)
    (x,) = CASES[name].inputs(torch.float64)
    plain, weights = reference(name, model)
    dropped = drops_alike(x, 0.5)
    biases = {n: torch.zeros_like(p) for n, p in base.named_parameters() if n.endswith("bias")}
    change = {n: W - base.get_parameter(n) for n, W in weights.items()}
    wanted = base(x) + torch.func.functional_call(plain, {**change, **biases}, (dropped,))
    torch.testing.assert_close(run(model, (x,))[0], wanted, rtol=1e-10, atol=1e-10)
    exact = torch.func.functional_call(plain, weights, (x,))
    torch.testing.assert_close(run(model.eval(), (x,))[0], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*CONV, *TRANSPOSED, "Linear", "Linear-dora"])
def test_the_forward_never_makes_the_effective_weight(name, monkeypatch):
    model = adapted(name)

    def read(self, parameter):
        raise AssertionError(f"{parameter} was read")

    monkeypatch.setattr("lora_lightning.layers.layer.LoRALayer.read", read)
    run(model, CASES[name].inputs())


@pytest.mark.parametrize("name", ["Conv2d", "Conv2d-groups", "Conv2d-depthwise", "ConvTranspose2d", "LSTM"])
def test_inputs_that_do_not_fit_are_refused_as_by_the_base(name):
    (x,) = CASES[name].inputs()
    wrong = torch.cat([x, x], dim=2 if name == "LSTM" else 1)
    with pytest.raises((RuntimeError, ValueError)) as base_error:
        base_model(name)(wrong)
    with pytest.raises(type(base_error.value)) as error:
        adapted(name)(wrong)
    assert str(error.value) == str(base_error.value)


def test_output_size_that_cannot_be_is_refused():
    model = adapted("ConvTranspose2d")
    with pytest.raises(ValueError, match="output size"):
        model.layer(torch.randn(2, 4, 3, 4), output_size=[50, 50])


@pytest.mark.parametrize("name", ["Conv2d-groups-dora", "Linear-dora", "LSTM-dora", "Conv2dSame-dora"])
def test_dora_survives_rows_of_zeros(name):
    model = base_model(name)
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if "weight" in n:
                parameter[1].zero_()
    inputs = CASES[name].inputs()
    before = run(model, inputs)
    ll.inject(model, config(name))
    outputs = run(model, inputs)
    torch.testing.assert_close(outputs, before)
    outputs[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ll.lora_parameters(model))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [
    lambda bias: nn.Conv1d(64, 64, 5, bias=bias),
    lambda bias: nn.Conv2d(64, 96, 1, bias=bias),
    lambda bias: nn.Conv2d(64, 64, 3, bias=bias),
])  # fmt: skip
def test_dora_in_inference_mode(build, bias, training):
    model = nn.Sequential(build(bias)).train(training)
    ll.inject(model, ll.LoRAConfig(rank=4, use_dora=True, target_modules=["0"]))
    x = torch.randn(2, 64, *[12] * (model[0].weight.dim() - 2))
    with torch.inference_mode():
        found = model(x.clone())
    torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-5)
