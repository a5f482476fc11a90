"""Base weights that arrive after the injection: what is made from base values follows them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_lightning as ll

ADAPTED = {"rank": 2, "target_modules": ["a", "b"], "modules_to_save": ["head"]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.norm.running_mean.normal_()

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x)).relu()).relu())


def adapted(**options) -> Net:
    net = Net().eval()
    ll.inject(net, ll.LoRAConfig(**{**ADAPTED, **options}))
    return net


def train(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def as_a_whole(net, other):
    net.load_state_dict(other.state_dict(), strict=False)


def assigned(net, other):
    net.load_state_dict(copy.deepcopy(other.state_dict()), strict=False, assign=True)


def by_its_parent(net, other):
    state = {f"net.{n}": t for n, t in other.state_dict().items()}
    nn.ModuleDict({"net": net}).load_state_dict(state, strict=False)


def compiled(net, other):
    """By a wrapper, which adds a word to the names."""
    net.b = torch.compile(net.b, backend="eager")
    whole, state = torch.compile(net, backend="eager"), other.state_dict()
    whole.load_state_dict(
        {f"_orig_mod.{n}".replace(".b.", ".b._orig_mod."): t for n, t in state.items()}, strict=False
    )
    net.b = net.b._orig_mod


def part_by_part(net, other):
    for name, part in net.named_children():
        part.load_state_dict(getattr(other, name).state_dict(), strict=False)


LOADINGS = [as_a_whole, assigned, by_its_parent, compiled, part_by_part]
OPTIONS = [{}, {"use_dora": True}, {"train_norm": "both", "train_bias": "all"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("load", LOADINGS)
def test_everything_follows_what_is_loaded(load, options):
    net, other, x = adapted(**options), Net().eval(), torch.randn(5, 6)
    ll.add_adapter(net, "idle")
    expected = other(x)
    net.head.weight.data.add_(1.0)  # the head has trained, the updates have not
    load(net, other)
    for one in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.allclose(one(x), expected, atol=1e-6)
        with ll.adapters_off(one):
            assert torch.equal(one(x), expected)
        ll.add_adapter(one, "new")
        for name in ("new", "idle"):
            ll.set_adapter(one, name)
            assert torch.allclose(one(x), expected, atol=1e-6)
        ll.eject(one)
        assert torch.equal(one(x), expected)
        hooks = [m._load_state_dict_pre_hooks or m._load_state_dict_post_hooks for m in one.modules()]
        assert not any(hooks)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_has_trained_stays(options):
    net, other, x = adapted(**options), Net().eval(), torch.randn(5, 6)
    train(net)
    ll.add_adapter(net, "idle")
    ll.set_adapter(net, "idle")
    head = net.lora_state.adapters["default"].values["head.weight"].clone()
    magnitudes = {n: p.clone() for n, p in net.named_parameters() if "default" in n and "lora_" in n}
    as_a_whole(net, other)
    assert torch.allclose(net(x), other(x), atol=1e-6)
    ll.set_adapter(net, "default")
    assert torch.equal(net.head.weight, head)
    assert all(torch.equal(dict(net.named_parameters())[n], p) for n, p in magnitudes.items())
    with ll.adapters_off(net):
        assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_state_of_an_adapted_model_brings_no_base_values(options):
    net, x = adapted(**options), torch.randn(5, 6)
    before, start = net(x), copy.deepcopy(net)
    train(net)
    trained = net(x)
    start.load_state_dict(net.state_dict())
    assert torch.allclose(start(x), trained)
    with ll.adapters_off(start):
        assert torch.allclose(start(x), before, atol=1e-6)


def test_weights_loaded_over_merged_ones_are_refused_and_nothing_is_loaded():
    net, other, x = adapted(), Net().eval(), torch.randn(5, 6)
    train(net)
    ll.merge(net)
    merged, state = net(x), copy.deepcopy(net.state_dict())
    with pytest.raises(ll.UserError, match=r"a.weight, b.weight would be loaded over them: call .*unmerge"):
        net.load_state_dict(other.state_dict(), strict=False)
    with pytest.raises(ll.UserError, match=r"merged .* weight would be loaded"):
        net.a.load_state_dict(other.a.state_dict(), strict=False)
    assert torch.equal(net(x), merged)
    net.load_state_dict(state)  # its own
    ll.unmerge(net)
    net.load_state_dict(other.state_dict(), strict=False)
    ll.eject(net)
    assert torch.equal(net(x), other(x))


def test_a_magnitude_at_its_start_follows_what_no_hook_sees(tmp_path):
    net, x = adapted(use_dora=True), torch.randn(5, 6)
    dict(net.named_parameters())["a.weight"].data.mul_(3.0)
    with ll.adapters_off(net):
        base = net(x)
    assert not torch.allclose(net(x), base)  # the weight itself cannot tell
    ll.set_adapter(net, "default")
    assert torch.allclose(net(x), base, atol=1e-6)


def test_quantized_weights_follow():
    net, other, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)), None, torch.randn(5, 64)
    other = copy.deepcopy(net)
    nn.init.normal_(other[0].weight)
    ll.quantize(net, "int8")
    ll.inject(net, ll.LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2"], use_dora=True))
    net.load_state_dict(other.state_dict(), strict=False)
    ll.quantize(other, "int8")
    assert torch.allclose(net(x), other(x), atol=1e-5)
    ll.eject(net)
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("place", ["a", "head"])
def test_a_replaced_module_is_one_message(place, tmp_path):
    def replaced():
        net = adapted()
        setattr(net, place, nn.Linear(8, 3) if place == "head" else nn.Linear(6, 8))
        return net

    def off(net):
        with ll.adapters_off(net):
            pass

    x = torch.randn(5, 6)
    uses = [
        off, ll.merge, lambda m: ll.eject(m, merged=True), lambda m: ll.save_adapter(m, tmp_path),
        lambda m: ll.add_adapter(m, "new"), lambda m: ll.set_adapter(m, "default"), lambda m: ll.verify(m, x),
        lambda m: ll.mixed_adapters(m, [None] * 5).__enter__(), lambda m: ll.load_adapter(m, tmp_path),
    ]  # fmt: skip
    for use in uses:
        net = replaced()
        before = net(x)
        with pytest.raises(
            ll.UserError, match=rf"^{place}: another module, or a weight of another shape, was put here"
        ):
            use(net)
        assert torch.equal(net(x), before)
    assert not list(tmp_path.iterdir())
    net = replaced()
    before, new = net(x), getattr(net, place)
    ll.eject(net)  # what was replaced stays
    assert getattr(net, place) is new and type(net.b) is nn.Linear
    assert torch.allclose(net(x), before, atol=1e-6)


@pytest.mark.parametrize("format", ["lora_lightning", "peft"])
def test_a_model_without_memory_is_one_message(format, tmp_path):
    with torch.device("meta"):
        net = adapted()
    uses = {
        "save_adapter": lambda: ll.save_adapter(net, tmp_path, format=format),
        "merge": lambda: ll.merge(net),
        r"eject\(merged=True\)": lambda: ll.eject(net, merged=True),
        "verify": lambda: ll.verify(net, torch.randn(3, 6)),
    }
    for name, use in uses.items():
        with pytest.raises(ll.UserError, match=rf"^{name}: a.weight, .* have no memory yet \(meta device\)"):
            use()
    assert not list(tmp_path.iterdir())
    net.to_empty(device="cpu")
    other = Net().eval()
    net.load_state_dict(other.state_dict(), strict=False)
    for module in net.modules():
        if hasattr(module, "lora_A"):
            module.reset_parameters()
    ll.merge(net)
    assert torch.allclose(net(torch.ones(2, 6)), other(torch.ones(2, 6)), atol=1e-6)


def test_get_parameter_gives_the_base_weight():
    net = adapted()
    train(net)
    parameters = dict(net.named_parameters())
    for name in ("a.weight", "a.bias", "head.weight", "a.lora.default.weight.lora_A"):
        assert net.get_parameter(name) is parameters[name]
    assert net.a.get_parameter("weight") is parameters["a.weight"]
    assert net.a.weight is not parameters["a.weight"]
    ll.merge(net)
    assert net.get_parameter("a.weight") is dict(net.named_parameters())["a.weight"]
    with pytest.raises(AttributeError):
        net.get_parameter("a.wieght")
