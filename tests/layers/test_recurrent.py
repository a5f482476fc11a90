"""Recurrent layers: gates by their equations, one call of the fused kernel, weights that are kept."""

import copy

import pytest
import torch
from families import CASES, adapted, base_model, config, equal, fill, run
from torch import Tensor, nn

import lora_lightning as ll

KERNELS = {"LSTM": "lstm", "LSTM-deep": "lstm", "LSTM-packed": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}


def lstm_step(weights: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The equations in the documentation of nn.LSTM, gate by gate."""
    gates = {}
    for i, gate in enumerate("ifgo"):
        rows = slice(6 * i, 6 * i + 6)
        gates[gate] = (
            x @ weights["weight_ih"][rows].t()
            + weights["bias_ih"][rows]
            + h @ weights["weight_hh"][rows].t()
            + weights["bias_hh"][rows]
        )
    c = gates["f"].sigmoid() * c + gates["i"].sigmoid() * gates["g"].tanh()
    return gates["o"].sigmoid() * c.tanh(), c


@pytest.mark.parametrize("gate", "ifgo")
def test_gates_of_an_lstm_are_those_of_its_equations(gate):
    model = nn.Sequential(nn.LSTMCell(5, 6).double())
    settings = ll.LoRAConfig(rank=2, target_modules=[f"weight_hh.{gate}"], modules_to_save=None)
    weights = {n: p.detach().clone() for n, p in model[0].named_parameters()}
    ll.inject(model, settings)
    fill(model)
    (update,) = model[0].lora["default"].values()
    delta = 2 * torch.einsum("or,ri->oi", update.lora_B, update.lora_A)
    x, h, c = torch.randn(3, 2, 5).double(), torch.randn(2, 6).double(), torch.randn(2, 6).double()
    first = 6 * "ifgo".index(gate)
    weights["weight_hh"][first : first + 6] += delta.detach()
    torch.testing.assert_close(model[0](x[0], (h, c)), lstm_step(weights, x[0], h, c), rtol=1e-10, atol=0)


@pytest.mark.parametrize("gate", "rzn")
def test_gates_of_a_gru_are_those_of_its_equations(gate):
    model = nn.Sequential(nn.GRU(5, 6).double())
    W = {n: p.detach().clone() for n, p in model[0].named_parameters()}
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=[f"weight_ih_l0.{gate}"], modules_to_save=None))
    fill(model)
    (update,) = model[0].lora["default"].values()
    delta = 2 * torch.einsum("or,ri->oi", update.lora_B, update.lora_A).detach()
    x, h = torch.randn(1, 2, 5).double(), torch.randn(1, 2, 6).double()

    def projected(values: Tensor, kind: str) -> tuple[Tensor, ...]:
        return (values @ W[f"weight_{kind}_l0"].t() + W[f"bias_{kind}_l0"]).chunk(3, dim=-1)

    change = x[0] @ delta.t()
    r, z, n = (part + change * (gate == g) for part, g in zip(projected(x[0], "ih"), "rzn", strict=True))
    hr, hz, hn = projected(h[0], "hh")
    z = (z + hz).sigmoid()
    new = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h[0]
    torch.testing.assert_close(model[0](x, h)[1][0], new, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_the_fused_kernel_runs_once_a_forward(name, monkeypatch):
    calls = []
    kernel = getattr(torch._VF, KERNELS[name])
    monkeypatch.setattr(torch._VF, KERNELS[name], lambda *args: calls.append(1) or kernel(*args))
    run(adapted(name), CASES[name].inputs())
    assert calls == [1]


@pytest.mark.parametrize("name", ["LSTM-gates", "LSTM-gates-dora", "GRU-gates", "LSTMCell-gates"])
def test_other_gates_stay_bit_for_bit(name):
    model, base = adapted(name), base_model(name)
    targets = CASES[name].targets
    gates = "rzn" if "GRU" in name else "ifgo"
    for parameter in {t.partition(".")[0] for t in targets}:
        before, after = getattr(base.layer, parameter), getattr(model.layer, parameter)
        for i, gate in enumerate(gates):
            same = torch.equal(before[6 * i : 6 * i + 6], after[6 * i : 6 * i + 6])
            assert same == (f"{parameter}.{gate}" not in targets)


def test_names_of_the_weights():
    model = nn.Sequential(nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=3), nn.RNNCell(5, 6))

    def names(*targets, **options):
        settings = {"rank": 2, "target_modules": list(targets), "modules_to_save": None, **options}
        return [p.name for p in ll.plan(model, ll.LoRAConfig(**settings)).layers]

    whole = names("0")
    assert len(whole) == 12 and "0.weight_hr_l1_reverse" in whole
    assert names("weight_hh_l1_reverse.o") == ["0.weight_hh_l1_reverse.o"]
    assert names("1") == ["1.weight_ih", "1.weight_hh"]
    assert names("1", exclude_modules=["weight_hh"]) == ["1.weight_ih"]
    for absent in ("weight_hr_l0.f", "weight_ih.f", "bias_ih_l0"):
        with pytest.raises(ll.ConfigError, match="matches no layer"):
            names(absent)


@pytest.mark.parametrize("name", ["LSTM-deep", "GRU"])
def test_what_is_read_elsewhere_is_the_effective_weight(name):
    model = adapted(name)
    for group, names in zip(model.layer.all_weights, model.layer._all_weights, strict=True):
        for weight, parameter in zip(group, names, strict=True):
            assert torch.equal(weight, getattr(model.layer, parameter))
            changed = not torch.equal(weight, model.layer._parameters[parameter])
            assert changed == parameter.startswith("weight")


def test_a_forward_that_fails_leaves_the_layer_whole():
    model, inputs = adapted("LSTM"), CASES["LSTM"].inputs()
    wanted = run(model, inputs)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 2, 9))
    assert equal(run(copy.deepcopy(model), inputs), wanted)


@pytest.mark.parametrize("name", ["LSTM", "LSTM-packed", "GRU", "weight-norm-LSTM"])
def test_change_of_dtype_after_injection(name):
    model, inputs = adapted(name), CASES[name].inputs()
    run(model, inputs)
    wanted = run(model, inputs)
    got = run(model.double(), tuple(x.double() for x in inputs))
    assert {y.dtype for y in got} == {torch.float64}
    torch.testing.assert_close([y.float() for y in got], wanted, rtol=1e-5, atol=1e-6)
    ll.eject(model)
    assert {y.dtype for y in run(model, tuple(x.double() for x in inputs))} == {torch.float64}
    model.layer.flatten_parameters()


def test_functional_calls_reach_the_updates():
    name = "LSTM"
    model, inputs = adapted(name), CASES[name].inputs()
    with torch.no_grad():
        zero = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n.endswith("lora_B")}
        torch.manual_seed(7)
        output = torch.func.functional_call(model, zero, inputs)[0]
        base = base_model(name)
        ll.inject(base, config(name))
        assert torch.equal(output, run(base, inputs)[0])
