"""Shrinking after training, against dense decompositions; and spectra in a model."""

import copy

import pytest
import torch
from families import CASES, adapted, run, typical_cases
from small import BATCHES, mlp, vit
from test_combine import NAMES, dense, families, relative, three

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers


def truncated(delta, groups, rank):
    parts = delta.reshape(groups, delta.shape[0] // groups, -1)
    U, S, V = torch.linalg.svd(parts, full_matrices=False)
    return (U[..., :rank] @ (S[:, :rank, None] * V[:, :rank])).reshape(delta.shape)


def updates(model, adapter="default"):
    """Each update, dense and by the name of its layer, with its groups; the scaling by the rule of rsLoRA."""
    found = {}
    for planned in model.lora_state.adapters[adapter].plan.layers:
        layer = model.get_submodule(planned.module)
        for key, update in layer.lora[adapter].items():
            if key == planned.slot.replace(".", "_") or (key == "weight" and not planned.slot):
                config = model.lora_state.adapters[adapter].config
                scaling = planned.alpha / (planned.rank**0.5 if config.use_rslora else planned.rank)
                unscaled = update.product(torch.empty(planned.shape)) / update.scaling
                found[planned.name] = (scaling * unscaled.double().detach(), update.slot.groups)
    return found


@typical_cases
def test_every_family_has_the_best_updates_of_the_rank(name):
    if CASES[name].options.get("use_dora"):
        pytest.skip("refused")
    rank = 1 if CASES[name].options.get("rank") == 1 else 2
    model, inputs = adapted(name, rank=rank), CASES[name].inputs()
    before = updates(model)
    told = ll.shrink(model, rank=1)
    after = updates(model)
    assert after.keys() == before.keys() == told.errors.keys()
    for layer, (delta, groups) in before.items():
        wanted = truncated(delta, groups, 1)
        torch.testing.assert_close(after[layer][0], wanted, rtol=1e-5, atol=1e-6)
        assert told.errors[layer] == pytest.approx(relative(wanted, delta), abs=1e-6)
    run(model, inputs)
    assert all(p.rank == 1 for p in model.lora_state.plan.layers)


@pytest.mark.parametrize("limits", [{"energy": 1.0}, {"rank": 100}])
def test_nothing_is_lost_where_all_is_kept(limits):
    model = three(vit)
    x = BATCHES[vit]()
    y = model(x)
    told = ll.shrink(model, **limits)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    assert told.error < 1e-6
    assert all(layer.rank == layer.before == 4 for layer in told.layers)


def test_an_energy_a_layer_and_a_budget_over_all():
    model, one = families(), "two"
    before = dense(model, one)
    told = ll.shrink(copy.deepcopy(model), energy=0.7, adapter=one)
    assert max(told.errors.values()) ** 2 <= 0.3 + 1e-9
    smaller = [layer for layer in told.layers if layer.rank > 1]
    assert 0 < len(smaller) < len(told.layers)
    short = copy.deepcopy(model)
    fewer = ll.shrink(short, budget=told.parameters, adapter=one)
    assert fewer.parameters <= told.parameters and fewer.error <= told.error
    after = dense(short, one)
    whole = sum(d.square().sum() for d in before.values())
    lost = sum((after.get(n, 0) - d).square().sum() for n, d in before.items())
    assert fewer.error == pytest.approx((lost / whole).sqrt().item(), abs=1e-5)
    assert "error %" in str(fewer) and f"{fewer.parameters:,}" in str(fewer)


def test_what_the_budget_has_nothing_for_is_plain_again(tmp_path):
    model = mlp().eval()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0", "3"], train_norm="affine"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        model[3].lora["default"]["weight"].lora_B.mul_(1e-3)
    head, norm = model[5].weight.clone(), model[1].weight.clone()
    told = ll.shrink(model, budget=22)  # one rank of the first layer
    assert [layer.rank for layer in told.layers] == [1, 0] and told.errors["3"] == 1
    assert "left as the base has them: 3" in str(told)
    assert type(model[3]) is torch.nn.Linear and list(lora_layers(model)) == ["0"]
    assert torch.equal(model[5].weight, head) and torch.equal(model[1].weight, norm)
    assert model[5].weight.requires_grad and model[0].lora["default"]["weight"].lora_A.requires_grad
    x = BATCHES[mlp]()
    ll.save_adapter(model, tmp_path)
    fresh = mlp().eval()
    fresh.load_state_dict(base_of(model))
    ll.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    assert ll.plan(mlp(), model.lora_state.config) == model.lora_state.plan
    assert model.lora_state.plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def base_of(model):
    base = copy.deepcopy(model)
    ll.eject(base)
    return base.state_dict()


def test_the_other_adapters_the_order_and_the_selection_stay():
    model = three(vit)
    others = {n: dense(model, n) for n in NAMES}
    own = {n: model.lora_state.adapters["one"].values.get(n, p).clone() for n, p in model.named_parameters()}
    x = BATCHES[vit]()
    ll.set_adapter(model, "one")
    first = model(x)
    ll.set_adapter(model, "three", "two")
    ll.shrink(model, rank=1, adapter="one")
    assert ll.adapter_names(model) == NAMES and model.lora_state.active == ("three", "two")
    for name in ("two", "three"):
        assert all(torch.equal(others[name][k], v) for k, v in dense(model, name).items())
    for name, value in model.lora_state.adapters["one"].values.items():
        assert torch.equal(value, own[name])
    ll.shrink(model, energy=1.0)  # the selected one
    assert ll.adapter_names(model) == NAMES and model.lora_state.active == ("three", "two")
    ll.set_adapter(model, "one")
    assert not torch.equal(model(x), first)
    model(x).sum().backward()


def test_an_adapter_with_rslora_or_a_quantized_base_keeps_its_scaling():
    torch.manual_seed(0)
    model = vit().eval()
    ll.quantize(model, "int8")
    ll.inject(model, ll.LoRAConfig(rank=4, alpha=3, use_rslora=True, rank_pattern={"qkv": 2}))
    with torch.no_grad():
        for parameter in ll.lora_parameters(model):
            parameter.normal_()
    x = BATCHES[vit]()
    y, before = model(x), [u.scaling for u in of_layers(model)]
    ll.shrink(model, energy=1.0)
    torch.testing.assert_close(model(x), y, rtol=1e-3, atol=1e-3)
    ll.shrink(model, rank=1)
    assert [u.scaling for u in of_layers(model)] == pytest.approx(before)
    assert ll.spectra(model).mean()["relative_norm"] > 0


@pytest.mark.parametrize("limits", [{"energy": 1.0}, {"rank": 2}])
def test_an_update_with_a_frozen_part_becomes_a_plain_one(limits):
    torch.manual_seed(0)
    model, x = vit().eval(), BATCHES[vit]()
    ll.inject(model, ll.LoRAConfig(rank=2, init="pissa"))
    with torch.no_grad():
        for parameter in ll.lora_parameters(model):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before, y = {n: d for n, (d, _) in updates(model).items()}, model(x)
    told = ll.shrink(model, **limits)
    assert {layer.before for layer in told.layers} == {4}
    assert all(p.fixed == 0 for p in model.lora_state.plan.layers)
    assert {p.rank for p in model.lora_state.plan.layers} == ({4} if "energy" in limits else {2})
    assert model.lora_state.config.init == "default"
    for layer, (delta, _) in updates(model).items():
        wanted = truncated(before[layer], 1, 4 if "energy" in limits else 2)
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-5)
    if "energy" in limits:
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_rounding_leaves_of_an_untrained_update_is_nothing(init):
    """Of B·A - B₀·A₀, too, of which both are far from zero; a layer that did not train keeps no rank."""
    torch.manual_seed(0)
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=3, init=init, target_modules="all", modules_to_save=None))
    assert set(ll.spectra(model).mean().values()) == {0.0}
    with pytest.raises(ll.UserError, match="every update is zero"):
        ll.shrink(model, energy=0.9)
    with torch.no_grad():
        model[3].lora.default.weight.lora_B.add_(1e-5 * torch.randn(12, 3))
    assert ll.spectra(model)["3"].effective_rank > 1
    ll.shrink(model, energy=1.0)
    assert [p.name for p in model.lora_state.plan.layers] == ["3"]


def test_what_is_refused_leaves_the_model_as_it_was():
    model = three(mlp)
    ll.add_adapter(model, "dora", ll.LoRAConfig(rank=2, use_dora=True))
    ll.add_adapter(model, "untrained")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for options, says in [
        ({}, "what to keep: give one of rank, energy or budget"),
        ({"rank": 1, "energy": 0.5}, "rank=1 and energy=0.5: give one of rank, energy or budget"),
        ({"energy": 95}, "energy=95: give a number above 0 and at most 1"),
        ({"rank": 0}, "rank=0: give a whole number of at least 1"),
        ({"budget": 3}, "budget=3: one rank of the smallest layer takes 22 parameters"),
        ({"rank": 1, "adapter": "dora"}, "use_dora=True.*extract_lora"),
    ]:
        with pytest.raises(ll.ConfigError, match=says):
            ll.shrink(model, **options)
    for name, says in (("untrained", "every update is zero"), ("on", "Did you mean 'one'")):
        with pytest.raises(ll.UserError, match=says):
            ll.shrink(model, rank=1, adapter=name)
    ll.merge(model)
    for function in (lambda m: ll.shrink(m, rank=1), ll.spectra):
        with pytest.raises(ll.UserError, match="unmerge"):
            function(model)
    ll.unmerge(model)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    with pytest.raises(ll.UserError, match="not an adapted model"):
        ll.shrink(mlp(), rank=1)


@pytest.mark.parametrize("name", ["Linear", "Conv2d-groups", "Embedding", "Attention-q-v", "LSTM-gates"])
def test_spectra_of_a_model(name):
    model = adapted(name)
    found, deltas = ll.spectra(model), updates(model)
    assert found.keys() == deltas.keys()
    base = base_of(model)
    for (layer, (delta, groups)), update in zip(deltas.items(), of_layers(model), strict=True):
        values = torch.linalg.svdvals(delta.reshape(groups, delta.shape[0] // groups, -1))
        torch.testing.assert_close(
            found[layer].values, values[:, : found[layer].values.shape[1]], rtol=1e-6, atol=1e-6
        )
        weight = base[next(n for n in base if n.endswith(update.slot.parameter))]
        if update.slot.out_range is not None:
            weight = weight[slice(*update.slot.out_range)]
        assert found[layer].relative == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-5)


def of_layers(model):
    return [u for layer in lora_layers(model).values() for u in layer.updates("default")]
