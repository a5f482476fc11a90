"""How many Python calls an adapted layer takes from `module(x)` to the product, and in the backward."""

import pytest
import torch
from torch import nn
from walk import walked

import lora_lightning as ll
from lora_lightning.kernels import conv_form, linear_form

MOST = 20
LAYERS = {
    "linear-64": (lambda: nn.Linear(64, 64), (16, 64)),
    "linear-768": (lambda: nn.Linear(768, 768), (200, 768)),
    "linear-768-sequences": (lambda: nn.Linear(768, 768), (2, 100, 768)),
    "conv": (lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 8, 8)),
    "conv-1x1": (lambda: nn.Conv2d(64, 64, 1), (2, 64, 8, 8)),
    "embedding": (lambda: nn.Embedding(50, 16), (2, 9)),
}


def adapted(name):
    make, shape = LAYERS[name]
    model = nn.Sequential(make())
    ll.inject(model, ll.LoRAConfig(rank=8, target_modules=["0"], modules_to_save=None))
    for parameter in ll.lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    if name == "embedding":
        return model[0], torch.randint(50, shape)
    return model[0], torch.randn(shape, requires_grad=True)


def ways(layer, x):
    """Calls of a forward, of its backward within the engine, and of a forward without gradients."""
    layer(x).sum().backward()  # what happens once
    made = {}
    forward = walked(lambda: made.setdefault("y", layer(x)))
    backward = walked(made["y"].sum().backward)
    engine = [name for _, name in backward].index("_engine_run_backward")
    own = [call for call in backward[engine + 1 :] if "logging" not in call[0]]
    with torch.no_grad():
        return forward, own, walked(lambda: layer(x))


@pytest.mark.shipped_threshold
@pytest.mark.parametrize("name", LAYERS)
def test_the_function_takes_at_most_twenty_calls(name, monkeypatch):
    monkeypatch.setattr(linear_form, "SMALL", 0)
    monkeypatch.setattr(conv_form, "SMALL", 0)
    forward, backward, plain = ways(*adapted(name))
    assert len(forward) <= MOST and len(plain) <= MOST
    assert len(backward) <= (26 if name == "conv-1x1" else MOST)  # of the merged form, with products for each


@pytest.mark.shipped_threshold
@pytest.mark.parametrize("name", LAYERS)
def test_small_layers_take_plain_operations(name):
    forward, backward, plain = ways(*adapted(name))
    assert len(forward) <= MOST and len(plain) <= MOST
    assert (backward == []) == ("768" not in name)


@pytest.mark.parametrize("switch", ["other", "train", "merge", "delete", "view"])
def test_what_is_computed_at_the_choice_follows_it(switch):
    """The layer's output after each change of the choice is that of the weight it then says that it has."""
    model = nn.Sequential(nn.Linear(8, 6))
    config = ll.LoRAConfig(rank=2, target_modules=["0"], modules_to_save=None, dropout=0.5)
    ll.inject(model, config)
    ll.add_adapter(model, "other", config)
    x = torch.randn(5, 8)
    for name in ("other", "default"):
        ll.set_adapter(model, name)
        for parameter in ll.lora_parameters(model):
            nn.init.normal_(parameter)
    model.eval()
    before = model(x)
    if switch == "other":
        ll.set_adapter(model, "other", "default")
    elif switch == "train":
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), before)
    elif switch == "merge":
        ll.merge(model)
        torch.testing.assert_close(model(x), before)
        ll.unmerge(model)
        assert torch.equal(model(x), before)
        ll.merge(model)
    elif switch == "delete":
        ll.delete_adapter(model, "other")
    else:
        with ll.adapters_off(model):
            assert torch.equal(
                model(x), nn.functional.linear(x, model[0].base_weight("weight"), model[0].bias)
            )
        assert torch.equal(model(x), before)
    torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
