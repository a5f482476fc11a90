"""A compiled model follows every change of state: merged, selected, off, mixed, dropping, ejected."""

import pytest
import torch
from families import CASES, adapted, base_model, config, fill, loss, run
from torch import nn

import lora_lightning as ll

QUICK = {"Linear", "Conv2d-groups", "LSTM", "Attention", "Embedding-padding", "weight-norm"}
names = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


def compiled(model: nn.Module, backend: str) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model, backend=backend)


def assert_same(ones, others) -> None:
    torch.testing.assert_close(ones, others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", names)
@pytest.mark.parametrize("grad", [pytest.param(True, marks=pytest.mark.slow), False], ids=["grad", "no_grad"])
def test_a_compiled_layer_follows_every_change(name, grad):
    backend = "eager" if name in QUICK else "aot_eager"
    model, inputs = adapted(name, dropout=0.0).eval(), CASES[name].inputs()
    ll.add_adapter(model, "two", config(name, rank=1))
    ll.set_adapter(model, "two")
    fill(model)
    ll.set_adapter(model, "default")
    fast = compiled(model, backend)
    with torch.set_grad_enabled(grad):
        live = run(fast, inputs)
        assert_same(live, run(model, inputs))
        ll.merge(model)
        assert_same(run(fast, inputs), live)
        with ll.adapters_off(model):
            off = run(fast, inputs)
            assert_same(off, run(base_model(name).eval(), inputs))
        assert_same(run(fast, inputs), live)
        ll.unmerge(model)
        assert_same(run(fast, inputs), live)
        with ll.adapters_off(model):
            assert_same(run(fast, inputs), off)
        for selected in (("two",), ("default", "two"), ("default",)):
            ll.set_adapter(model, *selected)
            assert_same(run(fast, inputs), run(model, inputs))
        assert_same(run(fast, inputs), live)
        assert any((a - b).abs().max() > 1e-3 for a, b in zip(live, off, strict=True))
        ll.eject(model)
        assert_same(run(fast, inputs), off)


@pytest.mark.parametrize("name", ["Linear", "Conv2d-groups", "LSTM"])
def test_a_compiled_layer_follows_what_trains(name):
    """Train mode, dropout and flags: the layers' own and what autograd needs of them."""
    model, inputs = adapted(name, dropout=0.0), CASES[name].inputs()
    fast = compiled(model, "eager")
    for mode in (True, False, True):
        model.train(mode)
        for trains in (True, False):
            for parameter in ll.lora_parameters(model):
                parameter.requires_grad_(trains)
            got, wanted = run(fast, inputs), run(model, inputs)
            assert_same(got, wanted)
            assert got[0].requires_grad == wanted[0].requires_grad
            if trains:
                assert_same(*(torch.autograd.grad(loss(y), ll.lora_parameters(model)) for y in (got, wanted)))


def test_a_compiled_layer_drops_in_train_mode_alone():
    model, (x,) = adapted("Linear", dropout=0.5), CASES["Linear"].inputs()
    fast = compiled(model, "eager")
    model.eval()
    exact = model(x)
    for mode in (False, True, False):
        model.train(mode)
        assert torch.allclose(fast(x), exact, atol=1e-5) != mode


def test_a_compiled_quantized_layer_follows_merging():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    ll.quantize(model, "int8")
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"], modules_to_save=None))
    nn.init.normal_(model[0].lora["default"]["weight"].lora_B)
    x, fast = torch.randn(3, 64), compiled(model, "eager")
    live = fast(x)
    torch.testing.assert_close(live, model(x))
    ll.merge(model)
    torch.testing.assert_close(fast(x), model(x))
    ll.unmerge(model)
    torch.testing.assert_close(fast(x), live)


def test_contexts_compile_once_and_without_a_graph_break():
    torch.compiler.reset()
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2"], train_norm="affine"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * 0.3)
    fast, x, seen = torch.compile(model, backend=count, fullgraph=True), torch.randn(4, 6), []
    for _ in range(3):
        torch.testing.assert_close(fast(x), model(x))
        with ll.adapters_off(model):
            torch.testing.assert_close(fast(x), model(x))
        seen.append(compilations)
    assert seen == [2, 2, 2]
