"""What is refused, with the model left as it was; and a linear probe, which trains the head alone."""

import pytest
import torch
from small import adapted, cnn, mlp
from torch import nn

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_merge_refuses_updates_that_are_not_finite_and_merges_nothing(bad):
    model = adapted(mlp)
    layers = lora_layers(model)
    last = list(layers)[-1]
    with torch.no_grad():
        layers[last].lora["default"]["weight"].lora_B[0, 0] = bad
    with pytest.raises(ll.UserError, match=rf"{last}.*NaN or infinity.*No layer was merged"):
        ll.merge(model)
    assert not any(layer.lora_merged for layer in layers.values())


@pytest.mark.parametrize("name", ["", "two words", "items", "a.b", "0"])
def test_bad_adapter_name_leaves_the_model_alone(name):
    model = mlp()
    with pytest.raises(ll.ConfigError, match="identifier"):
        ll.inject(model, ll.LoRAConfig(rank=2), adapter=name)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_injecting_twice_is_refused():
    model = adapted(mlp)
    with pytest.raises(ll.ConfigError, match="adapted already"):
        ll.inject(model)


@pytest.mark.parametrize("act", [ll.merge, ll.unmerge, ll.eject, ll.lora_state_dict])
def test_a_model_that_is_not_adapted_is_refused(act):
    with pytest.raises(ll.UserError, match=r"inject\(model\) first"):
        act(mlp())


def test_freeze_trains_the_head_alone():
    model = cnn()
    plan = ll.linear_probe(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"9.weight", "9.bias"}
    assert plan.trainable == 39
    model.train()
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    ll.eject(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_linear_probe_trains_the_head_alone():
    """Whatever LoRA would train beside its updates."""
    model = cnn()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = ll.LoRAConfig(modules_to_save=["9"], train_norm="both", train_bias="all")
    assert ll.linear_probe(model, config).trainable == 12 * 3 + 3
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["9.weight", "9.bias"]
    model.train()(torch.randn(4, 3, 10, 10))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())  # the statistics too
