"""The general road and what all families share: parametrizations, tied and shared weights, resetting."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import CASES, adapted, base_model, config, equal, fill, run
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers


def injected(model: nn.Module, *targets: str, **options) -> nn.Module:
    settings = {"rank": 2, "target_modules": list(targets), "modules_to_save": None, **options}
    ll.inject(model, ll.LoRAConfig(**settings))
    return model


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 3))


def test_planning_does_not_move_a_spectral_norm():
    model = spectral().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ll.plan(model, ll.LoRAConfig(rank=2, target_modules="all"))
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert model.training


@pytest.mark.parametrize(("train_norm", "moves"), [("frozen", False), ("stats", True)])
def test_a_frozen_spectral_norm_does_not_iterate(train_norm, moves):
    model = injected(spectral(), "0", train_norm=train_norm).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert before
    model(torch.randn(4, 6))
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers()) == moves
    ll.eject(model)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model(torch.randn(4, 6))  # plain again, it iterates in train mode
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers())


WEIGHT_NORMED = [n for n in CASES if "weight-norm" in n or "weight_norm" in n]
SPECTRAL = [n for n in CASES if n.startswith("spectral-norm")]


@pytest.mark.parametrize("name", WEIGHT_NORMED)
@pytest.mark.parametrize("how", ["eject", "merge"])
def test_a_merged_weight_normed_layer_loads_as_the_base_does(name, how):
    """The keys of its state_dict() are those of the base, and g and v in them give the merged weight."""
    model, inputs = adapted(name).eval(), CASES[name].inputs()
    wanted = run(model, inputs)
    ll.eject(model, merged=True) if how == "eject" else ll.merge(model)
    base = base_model(name)
    base.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" not in n})
    for plain in (model, base.eval()):
        for one, other in zip(run(plain, inputs), wanted, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("name", WEIGHT_NORMED)
def test_unmerging_gives_a_weight_normed_layer_its_g_and_v_back(name):
    model = adapted(name)
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    ll.merge(model)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n][1])]
    assert changed
    ll.unmerge(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[n] is p and torch.equal(p, value) for n, (p, value) in before.items())


@pytest.mark.parametrize("name", SPECTRAL)
def test_what_no_parametrization_gives_is_said(name):
    model, inputs = adapted(name).eval(), CASES[name].inputs()
    wanted = run(model, inputs)
    with pytest.warns(UserWarning, match=r"weight.*its state_dict\(\) holds the base's.*eject"):
        ll.merge(model)
    assert equal(run(model, inputs), wanted)
    with pytest.warns(UserWarning, match=r"weight.* plain parameters now"):
        ll.eject(model, merged=True)
    assert not any(is_parametrized(m) for m in model.modules())
    for one, other in zip(run(model, inputs), wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_merging_writes_into_no_tensor_that_others_hold():
    layer = parametrizations.weight_norm(nn.Linear(6, 5))
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    before = g.clone(), v.clone()
    model = injected(nn.Sequential(layer), "0")
    fill(model)
    ll.eject(model, merged=True)
    assert torch.equal(g, before[0]) and torch.equal(v, before[1])
    assert layer.parametrizations.weight.original1 is not v


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_what_the_layer_computes_with(name):
    """Other code may read a weight and never call its layer."""
    model, base = adapted(name), base_model(name)
    for layer_name, layer in lora_layers(model).items():
        for parameter in layer.properties:
            effective = getattr(layer, parameter)
            assert effective.requires_grad
            before = getattr(base.get_submodule(layer_name), parameter)
            assert effective.shape == before.shape and effective.dtype == before.dtype
            assert not torch.equal(effective, before)
            with ll.adapters_off(model):
                assert torch.equal(getattr(layer, parameter), before) or "spectral" in name


def test_an_instances_own_forward_sees_the_update():
    """Tools that replace `forward` on the object, as accelerate does, keep the update."""
    layer = nn.Linear(6, 5)
    layer.forward = layer.forward
    model = injected(nn.Sequential(layer), "0")
    fill(model)
    x = torch.randn(2, 6)
    torch.testing.assert_close(model(x), F.linear(x, layer.weight, layer.bias))
    assert not torch.allclose(model(x), F.linear(x, layer.base_weight("weight"), layer.bias))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.body = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 9, bias=False)
        self.lm_head.weight = self.table.weight

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.body(self.table(i)))


@pytest.mark.parametrize(("target", "other"), [("table", "lm_head"), ("lm_head", "table")])
def test_a_tied_weight_is_adapted_in_one_place_alone(target, other):
    model = Tied()
    shared = model.table.weight
    before = shared.detach().clone()
    fill(injected(model, target))
    adapted_layer, plain = model.get_submodule(target), model.get_submodule(other)
    i = torch.arange(5)
    wanted = model(i)
    for step in ("adapted", "merged", "unmerged"):
        if step == "merged":
            ll.merge(model)
        elif step == "unmerged":
            ll.unmerge(model)
        assert plain.weight is shared and torch.equal(shared, before)
        assert torch.equal(adapted_layer.weight, before) is False
        torch.testing.assert_close(model(i), wanted)
    ll.eject(copy.deepcopy(model))
    ll.eject(model, merged=True)
    assert torch.equal(plain.weight, before) and not torch.equal(adapted_layer.weight, before)
    torch.testing.assert_close(model(i), wanted)


def test_tied_weights_are_tied_again_after_eject():
    model = injected(Tied(), "table")
    ll.merge(model)
    ll.eject(model)
    assert model.table.weight is model.lm_head.weight


def test_a_head_that_is_tied_is_no_head_to_train_unless_it_is_named():
    assert ll.plan(Tied(), ll.LoRAConfig(rank=2)).heads == []
    model = Tied()
    settings = ll.LoRAConfig(rank=2, target_modules=["body"], modules_to_save=["lm_head"])
    planned = ll.inject(model, settings)
    assert model.lm_head.weight.requires_grad
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == 36 + 16
    before = model.table.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with ll.adapters_off(model):
        assert torch.equal(model.table.weight, before)


class Shared(nn.Module):
    """One layer in three places, and others inside containers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.stack = nn.ModuleList([self.first, nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"x": nn.Conv1d(4, 4, 1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stack[1](self.stack[0](self.second(self.first(x)).relu()).relu())
        return self.named["x"](x.mT).mT


def test_a_shared_layer_is_adapted_once_and_everywhere():
    torch.manual_seed(0)
    model, base = Shared(), Shared()
    base.load_state_dict(model.state_dict())
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    assert list(lora_layers(model)) == ["first", "stack.1", "named.x"]
    assert model.first is model.second is model.stack[0]
    fill(model)
    x = torch.randn(2, 3, 4)
    wanted = model(x)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            base.get_submodule(name).weight.copy_(layer.weight)
    torch.testing.assert_close(base(x), wanted)
    twin = copy.deepcopy(model)
    assert twin.first is twin.stack[0]
    ll.merge(model)
    torch.testing.assert_close(model(x), wanted)
    ll.eject(model)
    assert type(model.second) is nn.Linear


@pytest.mark.parametrize("name", ["Linear", "Linear-dora", "Conv2d", "Embedding", "LSTM", "Attention"])
def test_resetting_begins_anew(name):
    model = adapted(name)
    old = {n: p.clone() for n, p in model.named_parameters()}
    for layer in lora_layers(model).values():
        getattr(layer, "reset_parameters", layer._reset_parameters)()
        layer._reset_parameters()
    for parameter_name, parameter in model.named_parameters():
        if "weight" in parameter_name and ".lora." not in parameter_name:
            changed = not torch.equal(parameter, old[parameter_name])
            assert changed or parameter_name == "layer.out_proj.weight"
    fresh = base_model(name)
    fresh.load_state_dict({n: t for n, t in model.state_dict().items() if ".lora." not in n})
    inputs = CASES[name].inputs()
    with torch.no_grad():
        torch.testing.assert_close(run(model, inputs), run(fresh, inputs))


def test_a_forward_on_the_meta_device():
    with torch.device("meta"):
        model = injected(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 4, 1)), "0", "1")
        assert model(torch.empty(3, 4)).shape == (4, 4)
        assert model[0].weight.shape == (4, 4)


def test_an_adapter_cannot_be_loaded_into_a_model_without_memory(tmp_path):
    ll.save_adapter(injected(nn.Sequential(nn.Linear(4, 4)), "0"), tmp_path)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ll.AdapterFileError, match="meta device"):
        ll.load_adapter(model, tmp_path)
    assert not lora_layers(model)


@pytest.mark.parametrize("name", ["Linear", "LSTM", "Attention-unbatched", "Embedding", "Conv2d"])
def test_a_model_that_is_one_layer(name, tmp_path):
    layer, inputs = base_model(name).layer, CASES[name].inputs()
    inputs = inputs * 3 if "Attention" in name else inputs
    settings = ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None)
    ll.inject(layer, settings)
    assert ll.verify(layer, inputs) == []
    fill(layer)
    ll.save_adapter(layer, tmp_path)
    other = base_model(name).layer
    ll.load_adapter(other, tmp_path)
    assert equal(run(other.eval(), inputs), run(layer.eval(), inputs))


def test_a_norm_goes_back_to_the_mode_that_the_model_is_in():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for train in (True, False):
        injected(model.train(), "0")
        model.train(train)
        ll.eject(model)
        assert model[1].training == train


def test_rank_of_a_config_reaches_every_family():
    for name in ("Conv1D", "own-class", "StdConv2d"):
        model = base_model(name)
        planned = ll.inject(model, config(name, rank=3, use_rslora=True))
        assert planned.layers[0].rank == 3
        (update,) = model.layer.lora["default"].values()
        assert update.scaling == pytest.approx(2 * (8 / 3) ** 0.5)
