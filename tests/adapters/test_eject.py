"""Ejecting gives back the very model, or with the updates merged a plain one of the same function."""

import copy

import pytest
import torch
from kinds import MODELS, pairs
from small import BATCHES, adapted, cnn
from torch import nn

import lora_lightning as ll


@pytest.mark.parametrize("build", MODELS)
def test_eject_gives_back_the_very_model(build):
    model = build()
    modules = dict(model.named_modules())
    classes = {n: type(m) for n, m in modules.items()}
    flags = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(i % 3 != 0)
        flags[name] = i % 3 != 0
    parameters = dict(model.named_parameters())
    values = {n: t.clone() for n, t in model.state_dict().items()}
    seen = []
    handle = next(iter(modules.values())).register_forward_hook(lambda *_: seen.append(1))
    ll.inject(model, ll.LoRAConfig(rank=2, train_norm="both", train_bias="all"))
    assert all(m is modules[n] for n, m in model.named_modules() if n in modules)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(BATCHES[build]()).square().mean().backward()
    optimizer.step()
    assert seen == [1]
    ll.eject(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    state = model.state_dict()
    assert state.keys() == values.keys()
    assert all(torch.equal(state[n], v) for n, v in values.items())
    handle.remove()


@pairs
def test_eject_merged_is_a_plain_model_with_the_trained_function(build, options):
    model = adapted(build, **options).eval()
    x = BATCHES[build]()
    before = model(x)
    ll.eject(model, merged=True)
    plain = build().eval()
    plain.load_state_dict(model.state_dict())  # strict: no key of ours is left
    torch.testing.assert_close(plain(x), before, rtol=1e-4, atol=1e-5)


def test_torch_folds_the_norms_of_an_ejected_model_into_its_convolutions():
    from torch.fx.experimental.optimization import fuse

    model = adapted(cnn, train_norm="both")
    model.train()(BATCHES[cnn]())  # statistics that are not 0 and 1
    model.eval()
    x = BATCHES[cnn]()
    before = model(x)
    ll.eject(model, merged=True)
    folded = fuse(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True),
        nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)),
        nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
    ],
    ids=["compressed", "spectral norm", "weight norm"],
)
def test_a_copy_that_is_ejected_leaves_the_original_as_it_was(layer):
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 5, 32)
    if isinstance(layer, nn.TransformerEncoderLayer):
        ll.compress(model, ranks={"*": 4}, data=[x])
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    without = model(x)
    for parameter in ll.lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    expected = model(x)
    assert (expected - without).abs().max() > 0.01
    ejected = copy.deepcopy(model)
    ll.eject(ejected, merged=True)
    torch.testing.assert_close(ejected(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
