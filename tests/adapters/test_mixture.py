"""A mixture of adapters with weights that train: against sums by hand, in files, in a Trainer."""

import copy
import math

import peft
import pytest
import torch
from families import CASES, base_model, config, equal, in_mode, loss, run, same_flags, typical_cases
from small import Classifier, loader, mlp, pretrained, trainer
from torch import nn

import lora_lightning as ll
from lora_lightning.adapters.verify import gradient_peaks
from lora_lightning.files.locate import read_source
from lora_lightning.files.merge import merge_state
from lora_lightning.layers.registry import lora_layers
from lora_lightning.trainer.first_steps import leaves_of


def of_two(name: str, dtype=torch.float32) -> nn.Module:
    """Two adapters of different ranks that are not zero, "one" selected."""
    model = base_model(name, dtype)
    ll.inject(model, config(name, use_dora=False), "one")
    ll.add_adapter(model, "two", config(name, rank=1, use_dora=False))
    torch.manual_seed(3)
    for layer in lora_layers(model).values():
        for parameter in (p for a in layer.lora for p in layer.lora[a].parameters()):
            nn.init.normal_(parameter, std=0.3)
    return model


def deltas(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    found = {}
    for path, layer in lora_layers(model).items():
        for key, update in layer.lora[adapter].items():
            left, right = update.thin_factors()
            found[f"{path}.{key}"] = (left @ right).flatten()
    return found


def set_weights(model: nn.Module, adapter: str, *logits: float) -> None:
    for layer in lora_layers(model).values():
        for update in layer.updates(adapter):
            update.lora_mixture.data.copy_(torch.tensor(logits, dtype=torch.float64))


@typical_cases
def test_it_is_the_weighted_sum_and_its_weights_alone_train(name, tmp_path):
    """Equal at first; then the sum with softmax weights, whose gradient is that of the sum by hand."""
    model, inputs = of_two(name, torch.float64), CASES[name].inputs(torch.float64)
    planned = ll.mixture(model, ["two", "one"], "both")
    assert planned.total == sum(p.numel() for p in base_model(name).parameters()) + sum(
        p.numel() for layer in lora_layers(model).values() for p in layer.lora["both"].parameters()
    )
    one, two, both = (deltas(model, a) for a in ("one", "two", "both"))
    for key, delta in both.items():
        torch.testing.assert_close(delta, 0.5 * (one[key] + two[key]))
    ll.set_adapter(model, "both")
    updates = [u for layer in lora_layers(model).values() for u in layer.updates("both")]
    trained = ll.lora_parameters(model)
    assert [p.shape for p in trained] == [(2,)] * len(updates)
    assert all(
        p.requires_grad == (".lora_mixture" in n) for n, p in model.named_parameters() if ".both." in n
    )
    set_weights(model, "both", 0.7, -0.4)
    w = 1 / (1 + math.exp(-0.4 - 0.7))  # of "two"
    for key, delta in deltas(model, "both").items():
        torch.testing.assert_close(delta, w * two[key] + (1 - w) * one[key])
    value = loss(run(model, inputs))
    gradients = torch.autograd.grad(value, trained)
    ll.combine(model, ["two", "one"], [w, 1 - w], into="plain")
    ll.set_adapter(model, "plain")
    torch.testing.assert_close(loss(run(model, inputs)), value, rtol=1e-9, atol=1e-9)
    ll.set_adapter(model, "both")
    for update, gradient in zip(updates, gradients, strict=True):
        torch.testing.assert_close(gradient.sum(), gradient.new_zeros(()), rtol=0, atol=1e-9)
        torch.testing.assert_close(gradient[0], slope(model, inputs, update), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def slope(model: nn.Module, inputs: tuple, update, step: float = 1e-5) -> torch.Tensor:
    """The derivative of the loss by an update's first number, from differences."""
    values = []
    for sign in (1, -2, 1):
        update.lora_mixture[0] += sign * step
        values.append(loss(run(model, inputs)))
    return (values[0] - values[1]) / (2 * step)


KEPT = ["Conv2d-groups", "ConvTranspose1d-groups", "Embedding-padding", "LSTM", "Attention-q-v", "Linear"]


@pytest.mark.parametrize("name", KEPT)
def test_it_is_an_adapter_like_any(name, tmp_path):
    """Saved, loaded where its sources are not, off, merged, copied, made plain; its sources may go."""
    model, inputs = of_two(name).eval(), CASES[name].inputs()
    ll.mixture(model, ["one", "two"], "both")
    ll.set_adapter(model, "both")
    set_weights(model, "both", 0.3, 1.0)
    ll.delete_adapter(model, "one")
    ll.delete_adapter(model, "two")
    wanted = run(model, inputs)
    ll.save_adapter(model, tmp_path)
    other = base_model(name).eval()
    ll.load_adapter(other, tmp_path, adapter="both")
    for twin in (other, copy.deepcopy(model)):
        assert equal(run(twin, inputs), wanted)
        assert ll.mixture_weights(twin) == ll.mixture_weights(model)
        assert [p.requires_grad for p in ll.lora_parameters(twin)] == [True] * len(ll.lora_parameters(model))
    with torch.no_grad(), ll.adapters_off(model):
        assert equal(run(model, inputs), run(in_mode(same_flags(name, model), False), inputs))
    merged = merge_state(read_source(tmp_path).saved, base_model(name).state_dict())
    other.load_state_dict(merged.state, strict=False)
    with ll.adapters_off(other):  # which has the merged weights as its base now
        for one, two in zip(run(other, inputs), wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    ll.combine(model, ["both"], [1.0], into="plain")
    for change in (lambda: ll.merge(model), lambda: (ll.unmerge(model), ll.set_adapter(model, "plain"))):
        change()
        for one, two in zip(run(model, inputs), wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert not any(layer.mixed for layer in model.lora_state.adapters["plain"].plan.layers)


def test_adapters_of_different_layers_heads_and_rows():
    """Where one adapter has no update the other's weight is a part of 1 still; heads are averaged."""
    model, x = pretrained(mlp), torch.randn(5, 6)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"]), "one")
    ll.add_adapter(model, "two", ll.LoRAConfig(rank=3, target_modules=["0", "3"]))
    for name in ("one", "two"):
        ll.set_adapter(model, name)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, std=0.3)
    heads = {}
    for name in ("one", "two"):
        ll.set_adapter(model, name)
        heads[name] = model[5].weight.detach().clone()
    ll.mixture(model, ["one", "two"], "both")
    ll.set_adapter(model, "both")
    torch.testing.assert_close(model[5].weight.detach(), (heads["one"] + heads["two"]) / 2)
    assert model[5].weight.requires_grad and not model[0].lora["both"]["weight"].lora_B.requires_grad
    alone = deltas(model, "two")["3.weight"]
    torch.testing.assert_close(deltas(model, "both")["3.weight"], alone / 2)
    assert ll.mixture_weights(model) == {n: {"one": 0.5, "two": 0.5} for n in ("0", "3")}
    assert torch.isfinite(model(x)).all()


def adapted_twice(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    module = Classifier(pretrained(mlp))
    ll.inject(module, ll.LoRAConfig(rank=2, modules_to_save=None), "one")
    ll.add_adapter(module, "two")
    for name in ("one", "two"):
        ll.set_adapter(module, name)
        for parameter in ll.lora_parameters(module):
            nn.init.normal_(parameter, std=0.3)
    ll.mixture(module, ["one", "two"], "both")
    return module


def test_a_trainer_learns_the_weights_and_goes_on_exactly(tmp_path):
    def fit(epochs, path=None):
        module = adapted_twice()
        run = trainer(tmp_path, ll.LoRACallback(adapter="both", verbose=False), max_epochs=epochs)
        run.fit(module, ll.ResumableLoader(loader(mlp).dataset, 4, shuffle=True), ckpt_path=path)
        return run, module

    before = adapted_twice().state_dict()
    first, _ = fit(1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    _, whole = fit(2)
    _, resumed = fit(2, tmp_path / "a.ckpt")
    assert equal([*resumed.state_dict().values()], [*whole.state_dict().values()])
    changed = {n for n, t in whole.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if "lora_mixture" in n}
    ll.set_adapter(whole, "both")
    weights = ll.mixture_weights(whole)
    assert all(sum(w.values()) == pytest.approx(1) and w["one"] != 0.5 for w in weights.values())
    loaded = ll.load_from_checkpoint(Classifier, tmp_path / "a.ckpt", model=pretrained(mlp))
    assert loaded.lora_state.plan == whole.lora_state.plan


def test_peft_gets_the_sum(tmp_path):
    module, x = adapted_twice(), torch.randn(5, 6)
    ll.set_adapter(module, "both")
    set_weights(module, "both", 1.0, 0.0)
    ll.save_adapter(module, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(pretrained(mlp), tmp_path)
    torch.testing.assert_close(theirs(x), module(x), rtol=1e-5, atol=1e-5)


def test_adapters_whose_ranks_came_from_data_have_a_sum():
    """The sum has ranks of its own, and no budget; nor does a mixture have the terms of another training."""
    model, x = pretrained(mlp), torch.randn(8, 6)
    config = ll.LoRAConfig(rank="auto", budget=300, regularizer={"frobenius": 1e-3}, modules_to_save=None)
    ll.inject(model, config, "one", data=[x])
    ll.add_adapter(model, "two", ll.LoRAConfig(rank=2, modules_to_save=None))
    ll.mixture(model, ["one", "two"], "both")
    ll.combine(model, ["one", "two"], [1.0, 1.0], into="sum")
    configs = [model.lora_state.adapters[name].config for name in ("both", "sum")]
    assert [c.budget for c in configs] == [None, None] and configs[0].regularizer == {}


def test_beside_an_adapter_with_a_regularizer_its_weights_are_seen_to_train():
    model = mlp()
    options = {"rank": 2, "target_modules": ["0", "3"], "modules_to_save": None}
    ll.inject(model, ll.LoRAConfig(**options, regularizer={"frobenius": 1.0}), "one")
    ll.add_adapter(model, "two", ll.LoRAConfig(**options))
    for layer in lora_layers(model).values():
        for update in (u for a in layer.lora for u in layer.updates(a)):
            nn.init.normal_(update.lora_B)
    ll.mixture(model, ["one", "two"], "both")
    ll.set_adapter(model, "one", "both")
    loss = model(torch.randn(4, 6)).square().sum()
    reached = leaves_of(loss)
    (loss + ll.regularization(model)).backward()
    peaks = gradient_peaks(model, reached)
    assert set(peaks) == {f"{layer} of {a}" for layer in "03" for a in ("one", "both")}
    assert all(peaks.values())


def test_what_is_wrong_is_told():
    model = adapted_twice()
    for names in ("one", ["one"], ["one", "one"]):
        with pytest.raises(ll.ConfigError, match="give a list of two or more adapters"):
            ll.mixture(model, names, "x")
    with pytest.raises(ll.UserError, match="no adapter 'thre'"):
        ll.mixture(model, ["one", "thre"], "x")
    with pytest.raises(ll.ConfigError, match="into='both': the model has an adapter of this name"):
        ll.mixture(model, ["one", "two"], "both")
    with pytest.raises(ll.UserError, match="'one' is no mixture"):
        ll.mixture_weights(model, "one")
    ll.add_adapter(model, "dora", ll.LoRAConfig(rank=2, use_dora=True))
    with pytest.raises(ll.ConfigError, match="use DoRA"):
        ll.mixture(model, ["one", "dora"], "x")
    with pytest.raises(ll.ConfigError, match="another configuration"):
        trainer(".", ll.LoRACallback(rank=3, adapter="both")).fit(model, loader(mlp))
