"""Networks that torch.compile or another wrapper holds: its word is no part of any name."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from small import Classifier, cnn, loader, mlp, moved, pretrained, trainer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora_lightning as ll
from lora_lightning.files.fingerprint import fingerprint_of
from lora_lightning.utils.names import named_modules, named_parameters, submodule


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


def compiled_inside(network: nn.Module) -> nn.Module:
    for name, child in list(network.named_children()):
        if list(child.parameters()):
            network._modules[name] = compiled(child)
    return network


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "not": lambda network: network,
    "compiled": compiled,
    "in place": compiled_in_place,
    "inside": compiled_inside,
    "several": lambda network: nn.DataParallel(compiled(network)),
    "checkpointed": checkpoint_wrapper,
}
QUICK_OUT, QUICK_IN = (("compiled", "not"), "adapter"), (("not", "compiled"), "full")
QUICK = ("compiled", "checkpointed")  # tracing takes a second each time
WRAPPED = [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow) for w in WRAPPERS if w != "not"]
PAIRS = [
    pytest.param(*pair, full, marks=[] if (pair, full) in (QUICK_OUT, QUICK_IN) else [pytest.mark.slow])
    for wrapper in WRAPPERS
    if wrapper != "not"
    for pair in ((wrapper, "not"), ("not", wrapper))
    for full in ("adapter", "full")
]


class Owner(Classifier):
    def __init__(self, wrapper: str = "not") -> None:
        super().__init__(WRAPPERS[wrapper](pretrained(cnn)))
        self.save_hyperparameters()


def outputs(module: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return module.eval()(x)


def same(one: nn.Module, other: nn.Module) -> bool:
    return torch.allclose(outputs(one), outputs(other), atol=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_plans_names_and_fingerprints_are_those_of_the_network(wrapper):
    plain, wrapped = Owner(), Owner(wrapper)
    assert named_modules(wrapped).keys() == named_modules(plain).keys()
    assert named_parameters(wrapped).keys() == named_parameters(plain).keys()
    assert type(submodule(wrapped, "model.3")) is nn.Conv2d
    config = ll.LoRAConfig(rank=2, train_norm="affine", train_bias="all")
    assert ll.plan(wrapped, config) == ll.plan(plain, config)
    assert fingerprint_of(wrapped) == fingerprint_of(plain)
    before = copy.deepcopy(plain.state_dict())
    for module in (wrapped, plain):
        ll.inject(module, config)
        moved(module)
    assert fingerprint_of(wrapped) == fingerprint_of(plain)
    assert ll.lora_state_dict(wrapped).keys() == ll.lora_state_dict(plain).keys()
    assert same(wrapped, plain)
    ll.eject(wrapped)
    assert all(torch.equal(p, before[n]) for n, p in named_parameters(wrapped).items())


@pytest.mark.parametrize(("saved", "loaded", "full"), PAIRS)
def test_checkpoints_are_of_the_network_wrapped_or_not(saved, loaded, full, tmp_path):
    # torch cannot compute BatchNorm's statistics again
    norm = "affine" if "checkpointed" in (saved, loaded) else "both"

    def callback():
        return ll.LoRACallback(rank=2, train_norm=norm, checkpoint=full)

    module, straight = Owner(saved), Owner(saved)
    torch.manual_seed(0)
    run = trainer(tmp_path, callback())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    network = {*Owner().state_dict(), *ll.lora_state_dict(module)}
    held = {n.replace(".lora.default.weight", "") for n, t in state.items() if t.numel()}
    assert held <= network and ("model.3.weight" in held) == (full == "full")
    assert same(ll.load_from_checkpoint(Owner, tmp_path / "x.ckpt", wrapper=loaded), module)
    torch.manual_seed(0)
    trainer(tmp_path, callback(), max_epochs=3).fit(straight, loader())
    resumed = Owner(loaded)
    trainer(tmp_path, callback(), max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert same(resumed, straight)


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("format", ["lora_lightning", "peft"])
def test_adapters_are_of_the_network_wrapped_or_not(wrapper, format, tmp_path):
    options = ll.LoRAConfig(rank=2)
    for source, target in ((wrapper, "not"), ("not", wrapper)):
        module = Classifier(WRAPPERS[source](pretrained(mlp)))
        ll.inject(module, options)
        moved(module)
        ll.save_adapter(module, tmp_path / source, format=format)
        x = torch.randn(5, 6)
        expected = module.eval()(x)
        for held in (Classifier, lambda network: network):
            again = held(WRAPPERS[target](pretrained(mlp)))
            ll.load_adapter(again, tmp_path / source)
            torch.testing.assert_close(again.eval()(x), expected, rtol=0, atol=1e-6)
            ll.save_adapter(again, tmp_path / "again", format=format)
        if format == "peft":
            theirs = peft.PeftModel.from_pretrained(pretrained(mlp), tmp_path / source)
            torch.testing.assert_close(theirs.eval()(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrapper", ["compiled", pytest.param("several", marks=pytest.mark.slow)])
def test_a_wrapped_model_is_adapted_as_what_it_wraps(wrapper):
    network, x = pretrained(mlp), torch.randn(5, 6)
    model = WRAPPERS[wrapper](network)
    before = network(x)
    plan = ll.inject(model, ll.LoRAConfig(rank=2))
    assert [p.name for p in plan.layers] == ["0", "3"] and plan.heads == ["5"]
    assert ll.adapter_names(network) == ["default"]
    moved(model)
    after = model(x)
    assert torch.allclose(after, network(x)) and not torch.allclose(after, before)
    ll.merge(model)
    assert torch.allclose(network(x), after, atol=1e-5)
    ll.unmerge(model)
    ll.add_adapter(model, "second")
    ll.set_adapter(network, "second")
    ll.eject(model)
    assert torch.equal(network(x), before)


def test_a_model_in_ddp_is_refused_before_anything_changes():
    model = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(model)
    model.module = pretrained(mlp)
    with pytest.raises(ll.ConfigError, match=r"DistributedDataParallel.*inject into the module first"):
        ll.inject(model, ll.LoRAConfig(rank=2))
    assert all(p.requires_grad for p in model.parameters())
