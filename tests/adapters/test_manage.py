"""Several adapters in one model: added, selected, switched off, merged, swapped, deleted."""

import copy
import pickle

import pytest
import torch
from several import MODELS, OTHERS, alone, flags, train, two
from small import BATCHES, mlp, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_each_adapter_selected_is_the_model_that_has_it_alone(build, options):
    model = two(build, **options)
    singles = {"one": alone(build, "one", 1, rank=2), "two": alone(build, "two", 2, **options)}
    x = BATCHES[build]()
    assert ll.adapter_names(model) == ["one", "two"]
    for name in ("one", "two", "one"):
        ll.set_adapter(model, name)
        single = singles[name]
        assert torch.equal(model(x), single(x))
        assert flags(model) == flags(single)
        assert {n for n, m in model.named_modules() if m.training} == set()
        for module in (model.train(), single.train()):
            module.train()
        own = {n for n, _ in single.named_modules()}
        assert {n: m.training for n, m in model.named_modules() if n in own} == {
            n: m.training for n, m in single.named_modules()
        }
        model.eval(), single.eval()
        with ll.adapters_off(model), ll.adapters_off(single):
            assert torch.equal(model(x), single(x))
    assert ll.verify(model, x) == []


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_several_at_once_are_the_sum_of_their_changes(build, options):
    model = two(build, **options)
    weights = {}
    for name in ("one", "two"):
        ll.set_adapter(model, name)
        with torch.no_grad():
            weights[name] = {
                (n, w): layer.read(w) - layer.base_weight(w)
                for n, layer in lora_layers(model).items()
                for w in layer.properties
            }
    ll.set_adapter(model, "one", "two")
    for (n, w), change in weights["one"].items():
        layer = lora_layers(model)[n]
        torch.testing.assert_close(layer.read(w), layer.base_weight(w) + change + weights["two"][n, w])
    names = {n for n in flags(model) if ".lora." in n}
    assert names == {n for n, _ in model.named_parameters() if ".lora." in n}
    x = BATCHES[build]()
    before = model(x)
    ll.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    for act in (
        lambda: ll.set_adapter(model, "one"),
        lambda: ll.delete_adapter(model, "one"),
        lambda: ll.add_adapter(model, "three"),
    ):
        with pytest.raises(ll.UserError, match=r"unmerge\(model\) first"):
            act()
    ll.unmerge(model)
    assert torch.equal(model(x), before)
    ll.eject(model, merged=True)
    torch.testing.assert_close(model.eval()(x), before, rtol=1e-4, atol=1e-5)


def test_heads_follow_the_first_named_and_updates_of_all_selected_train():
    model = two(vit, rank=3)
    heads = {}
    for name in ("one", "two"):
        ll.set_adapter(model, name)
        heads[name] = model.head.weight.detach().clone()
    assert not torch.equal(heads["one"], heads["two"])
    for first, second in (("one", "two"), ("two", "one")):
        ll.set_adapter(model, first, second)
        assert torch.equal(model.head.weight, heads[first])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    ll.set_adapter(model, "one")
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.train()(BATCHES[vit]()).square().mean().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == flags(model)
    assert not any(".lora.two." in n for n in changed)
    ll.set_adapter(model, "two")
    assert torch.equal(model.head.weight, heads["two"])


@pytest.mark.parametrize("build", MODELS)
def test_deleting_the_last_adapter_of_a_layer_gives_it_its_class_back(build):
    model = two(build, rank=1, target_modules="all", train_norm="both")
    single = alone(build, "one", 1, rank=2)
    assert lora_layers(model).keys() >= lora_layers(single).keys()
    ll.delete_adapter(model, "two")
    classes = {n: type(m) for n, m in single.named_modules()}
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert flags(model) == flags(single)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in single.named_parameters()]
    x = BATCHES[build]()
    assert torch.equal(model(x), single(x))
    with pytest.raises(ll.UserError, match=r"'one' is selected.*eject\(model\)"):
        ll.delete_adapter(model, "one")


def test_an_adapter_over_other_weights_of_the_same_module():
    """The class of a recurrent layer computes the weights that some adapter updates, and no others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(4, 6))
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["weight_ih_l0"]), adapter="input")
    ll.add_adapter(model, "state", ll.LoRAConfig(rank=2, target_modules=["weight_hh_l0.f"]))
    layer = model[0]
    assert layer.properties == ("weight_hh_l0", "weight_ih_l0")
    ll.set_adapter(model, "state")
    train(model, 0)
    assert torch.equal(layer.weight_ih_l0, layer.base_weight("weight_ih_l0"))
    assert not torch.equal(layer.weight_hh_l0, layer.base_weight("weight_hh_l0"))
    ll.delete_adapter(model, "input")
    assert layer.properties == ("weight_hh_l0",)
    assert torch.isfinite(layer(torch.randn(3, 2, 4))[0]).all()


def test_a_head_of_one_adapter_can_be_a_target_of_another():
    torch.manual_seed(0)
    model = mlp()
    base = model[5].weight.detach().clone()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["5"]), adapter="head")
    train(model, 0)
    head = model[5].weight.detach().clone()
    ll.add_adapter(model, "layer", ll.LoRAConfig(rank=2, target_modules=["5"], modules_to_save=None))
    assert torch.equal(model[5].weight, head)
    ll.set_adapter(model, "layer")
    assert torch.equal(model[5].weight, base)
    assert flags(model) == {"5.lora.layer.weight.lora_A", "5.lora.layer.weight.lora_B"}
    ll.set_adapter(model, "head", "layer")
    assert "5.weight" in flags(model)
    assert torch.equal(model[5].weight, head)
    ll.eject(model)
    assert torch.equal(model[5].weight, base)


def test_the_head_outside_the_backbone_is_each_adapters_own():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = mlp()
            self.top = nn.Linear(3, 2)

    model = Net()
    ll.inject(model, ll.LoRAConfig(rank=2), adapter="one")
    train(model, 1)
    present = model.top.weight.detach().clone()
    ll.add_adapter(model, "two")
    ll.set_adapter(model, "two")
    assert torch.equal(model.top.weight, present)
    train(model, 2)
    with ll.adapters_off(model):
        assert not torch.equal(model.top.weight, present)
    ll.set_adapter(model, "one")
    assert torch.equal(model.top.weight, present)
    with pytest.raises(ll.ConfigError, match="same backbone: give 'backbone'"):
        ll.add_adapter(model, "three", ll.LoRAConfig(rank=2, backbone="backbone.0"))


@pytest.mark.parametrize("build", MODELS)
def test_plan_for_one_more_adapter_is_the_plan_of_the_plain_model(build):
    config = ll.LoRAConfig(rank=1, train_norm="affine")
    plain = ll.plan(build(), config)
    model = alone(build, "one", 1, rank=2, train_norm="both", train_bias="all")
    before = {n: (type(m), m.training) for n, m in model.named_modules()}
    order = [(n, p.requires_grad) for n, p in model.named_parameters()]
    planned = ll.add_adapter(model, "two", config)
    assert planned == plain
    assert (planned.trainable, planned.total, planned.skipped) == (
        plain.trainable,
        plain.total,
        plain.skipped,
    )
    after = {n: (type(m), m.training) for n, m in model.named_modules() if ".two" not in n}
    assert after == before
    assert [(n, p.requires_grad) for n, p in model.named_parameters() if ".lora.two." not in n] == order


@pytest.mark.parametrize("build", MODELS)
def test_copies_and_pickles_have_all_adapters(build):
    model = two(build, **OTHERS["own"])
    x = BATCHES[build]()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in ("two", "one"):
            ll.set_adapter(twin, name)
            ll.set_adapter(model, name)
            assert torch.equal(twin(x), model(x))
        ll.eject(twin)
        assert not lora_layers(twin)


@pytest.mark.parametrize("build", MODELS)
def test_eject_with_several_adapters_gives_the_base(build):
    torch.manual_seed(0)
    base = build()
    model = two(build, **OTHERS["own"])
    ll.set_adapter(model, "two", "one")
    ll.eject(model)
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in model.state_dict().items())
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert all(p.requires_grad for p in model.parameters())


def test_names_that_are_wrong_are_named_with_near_misses():
    model = two(mlp, rank=3)
    for act in (lambda: ll.set_adapter(model, "onne"), lambda: ll.delete_adapter(model, "onne"),
                lambda: ll.lora_state_dict(model, "onne")):  # fmt: skip
        with pytest.raises(
            ll.UserError, match=r"no adapter 'onne'. Did you mean 'one'\?.*Give one of one, two"
        ):
            act()
    with pytest.raises(ll.ConfigError, match="has an adapter of this name"):
        ll.add_adapter(model, "two")
    with pytest.raises(ll.ConfigError, match="identifier"):
        ll.add_adapter(model, "two words")
    with pytest.raises(ll.ConfigError, match="nothing"):
        ll.add_adapter(model, "three", ll.LoRAConfig(target_modules=["nothing"]))
    for names in ((), ("one", "one")):
        with pytest.raises(ll.UserError, match="each once, of one, two"):
            ll.set_adapter(model, *names)
    with pytest.raises(ll.UserError, match=r"'one' is selected.*set_adapter\(model, 'two'\) first"):
        ll.delete_adapter(model, "one")
    assert ll.adapter_names(model) == ["one", "two"]
    with ll.adapters_off(model), pytest.raises(ll.UserError, match="leave that context first"):
        ll.set_adapter(model, "two")
