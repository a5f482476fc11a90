"""Several adapters in one model: added, selected, switched off, merged, swapped, deleted."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from small import BATCHES, Classifier, cnn, encoder, loader, mlp, trainer, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers

MODELS = [mlp, cnn, vit, encoder]
# Other ranks, layers, kinds of update and own values than the first adapter's.
OTHERS = {
    "rank": {"rank": 3},
    "dora": {"rank": 2, "use_dora": True},
    "own": {"rank": 2, "train_norm": "both", "train_bias": "all"},
    "all": {"rank": 1, "target_modules": "all", "modules_to_save": None},
}


@torch.no_grad()
def train(model: nn.Module, seed: int) -> None:
    """Give whatever trains now values of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    own = set(model.lora_state.adapters[model.lora_state.adapter].extra_trainables)
    for name, buffer in model.named_buffers():
        if name in own and buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape, generator=generator))


def alone(build, name: str, seed: int, **options) -> nn.Module:
    """A model with this adapter only."""
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(seed)
    ll.inject(model, ll.LoRAConfig(**options), adapter=name)
    train(model, seed)
    return model.eval()


def two(build, **options) -> nn.Module:
    """A model with the adapters "one" (rank 2) and "two", whose values are those of `alone`."""
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(1)
    ll.inject(model, ll.LoRAConfig(rank=2), adapter="one")
    train(model, 1)
    torch.manual_seed(2)
    ll.add_adapter(model, "two", ll.LoRAConfig(**options))
    ll.set_adapter(model, "two")
    train(model, 2)
    ll.set_adapter(model, "one")
    return model.eval()


def flags(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


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
    with pytest.raises(ll.ConfigError, match="same backbone, here 'backbone'"):
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
        with pytest.raises(ll.UserError, match=r"no adapter 'onne'. Did you mean 'one'.*has one, two"):
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


@pytest.mark.parametrize("adapter", ["one", "two"])
@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("build", [cnn, encoder])
def test_a_saved_adapter_loads_under_another_name_or_in_place(build, options, adapter, tmp_path):
    """As a new name; over one of the same shapes; over one of another rank; selected or not."""
    model = two(build, **options)
    x = BATCHES[build]()
    ll.save_adapter(model, tmp_path, adapter=adapter)
    ll.set_adapter(model, adapter)
    wanted = model(x)
    for name in ("three", "three", "one", "two"):
        for selected in (["one"], ["two", "one"]):
            twin = two(build, **options)
            ll.add_adapter(twin, "four", ll.LoRAConfig(rank=4, target_modules="all"))
            ll.set_adapter(twin, *selected)
            before = twin(x)
            ll.load_adapter(twin, tmp_path, adapter=name)
            assert list(twin.lora_state.active) == selected
            if name not in selected:
                assert torch.equal(twin(x), before)
            ll.set_adapter(twin, name)
            torch.testing.assert_close(twin(x), wanted, rtol=1e-6, atol=1e-6)


def test_loading_over_the_same_shapes_compiles_nothing_anew(tmp_path):
    compiled = 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    other = alone(vit, "default", 5, rank=2)
    ll.save_adapter(other, tmp_path)
    model = alone(vit, "default", 6, rank=2)
    fast = torch.compile(model, fullgraph=True, backend=count)
    x = BATCHES[vit]()
    before = fast(x)
    assert compiled == 1
    ll.load_adapter(model, tmp_path, adapter="default")
    assert not torch.equal(fast(x), before)
    torch.testing.assert_close(fast(x), other(x))
    assert compiled == 1
    ll.save_adapter(alone(vit, "default", 7, rank=4), tmp_path)
    with pytest.raises(ll.AdapterFileError, match="rank 2 in the model, 4 in the file"):
        ll.load_adapter(model, tmp_path)
    ll.load_adapter(model, tmp_path, adapter="default")
    torch.testing.assert_close(fast(x), alone(vit, "default", 7, rank=4)(x))
    assert compiled == 2


def test_a_lightning_module_with_two_adapters_saves_the_right_one(tmp_path):
    module = two(lambda: Classifier(vit()), rank=3)
    ll.save_adapter(module, tmp_path, adapter="two")
    torch.manual_seed(0)
    bare = vit().eval()
    ll.load_adapter(bare, tmp_path)
    x = BATCHES[vit]()
    assert not torch.equal(bare(x), module(x))
    ll.set_adapter(module, "two")
    assert torch.equal(bare(x), module(x))


def test_a_trainers_checkpoint_holds_every_adapter(tmp_path):
    """The heads of adapters that are not selected too; other adapters or another selection are refused."""

    def module(*selected: str) -> Classifier:
        model = two(lambda: Classifier(cnn()), **OTHERS["own"])
        ll.set_adapter(model, *selected)
        return model

    def fit(model, path=None):
        callback = ll.LoRACallback(model.lora_state.config, verbose=False)
        run = trainer(tmp_path, callback, max_epochs=1 if path is None else 2, enable_checkpointing=False)
        run.fit(model, loader(), ckpt_path=path)
        run.save_checkpoint(tmp_path / "run.ckpt")

    trained, x = module("two"), BATCHES[cnn]()
    with torch.no_grad():
        for value in trained.lora_state.adapters["one"].values.values():
            value.add_(1)
    fit(trained)
    resumed = module("two")
    fit(resumed, tmp_path / "run.ckpt")
    assert not torch.equal(resumed.eval()(x), trained.eval()(x))
    for model in (trained, resumed):
        ll.set_adapter(model, "one")
    assert torch.equal(resumed.eval()(x), trained.eval()(x))
    single = alone(lambda: Classifier(cnn()), "one", 1, rank=2)
    for other, says in [(module("one"), "select the same"), (single, "select the same")]:
        with pytest.raises((ll.UserError, RuntimeError), match=says):
            fit(other, tmp_path / "run.ckpt")


def test_the_examples_of_the_documentation(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "adapters.md", "exec"), names)
    model = names["model"]
    assert ll.adapter_names(model) == ["scottish", "visitor", "irish", "both", "short", "ties"]
    assert names["y"].shape == (4, 10)
