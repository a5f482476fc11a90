"""The promises of an adapted model, of models that call or read their weights, by kinds of adapters."""

import copy
import pickle

import pytest
import torch
from kinds import MODELS, pairs
from small import BATCHES, adapted, cnn, mlp, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers


class Mixture(nn.Module):
    """A convolution, a norm, an encoder layer that reads weights, and an MLP: each called as in its model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cnn()[:6]
        self.encoder = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).mT  # (batch, places, channels)
        return self.head(self.encoder(tokens).mean(1))


BATCHES = {**BATCHES, Mixture: BATCHES[cnn]}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = lora_layers(model).items()
    return {
        f"{n}.{name}": layer.base_weight(name).clone() for n, layer in layers for name in layer.properties
    }


@pairs
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_do_not_change_at_injection(build, mode, options):
    model = build().train(mode == "train")
    for module in model.modules():  # the base in train mode would use batch statistics
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    base = copy.deepcopy(model)
    ll.inject(model, ll.LoRAConfig(rank=2, **options))
    for own, other in zip(
        [p for n, p in model.named_parameters() if ".lora." not in n], base.parameters(), strict=True
    ):
        other.requires_grad_(own.requires_grad)
    x = BATCHES[build]()
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    wanted = base(x)  # with gradients, read weights require one, and torch may take another kernel
    assert (model(x) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pairs
def test_effective_weight_is_what_the_model_computes(build, options):
    """An independent model with W + s·B·A (times DoRA's factors) written into its weights agrees, in
    train and in eval mode."""
    model = adapted(build, **options)
    reference = build()
    state = {k: v for k, v in model.state_dict().items() if ".lora." not in k}
    for name, layer in lora_layers(model).items():
        (update,) = layer.lora["default"].values()
        key = f"{name}.{update.slot.parameter}"
        rank = update.lora_A.shape[0]
        scaling = 2 * ((8 / rank) ** 0.5 if options.get("use_rslora") else 1)
        W = state[key] + scaling * torch.einsum("or,r...->o...", update.lora_B, update.lora_A)
        if options.get("use_dora"):
            before = state[key].flatten(1).norm(dim=1)
            W = W * (before / W.flatten(1).norm(dim=1)).view(-1, *[1] * (W.dim() - 1))
        state[key] = W.detach()
    reference.load_state_dict(state)
    x = BATCHES[build]()
    for mode in (False, True):
        model.train(mode)
        reference.train(mode)
        for module in reference.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        with torch.no_grad():  # the TransformerEncoder takes its fused path in eval mode
            torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


@pairs
def test_gradients_equal_those_through_the_effective_weight(build, options):
    """The low-rank branch and autograd through W + s·B·A give the same gradients, in float64."""
    model = adapted(build, **options).double().train()
    x = BATCHES[build]().double()
    model(x).square().sum().backward()
    fast = [p.grad.clone() for p in ll.lora_parameters(model)]
    model.zero_grad()
    weights = {
        f"{n}.{name}": layer.read(name)
        for n, layer in lora_layers(model).items()
        for name in layer.properties
    }
    plain = copy.deepcopy(model)
    ll.eject(plain, merged=True)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.func.functional_call(plain, weights, (x,)).square().sum().backward()
    for got, parameter in zip(fast, ll.lora_parameters(model), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("build", MODELS)
def test_training_changes_only_what_trains(build):
    model = adapted(build).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    trained = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(BATCHES[build]()).square().mean().backward()
        optimizer.step()
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert frozen and all(torch.equal(after[n], before) for n, before in frozen.items())
    assert all(torch.equal(after[n], before) for n, before in buffers.items())
    assert all(not torch.equal(after[n], before) for n, before in trained.items())


@pairs
@torch.no_grad()
def test_adapters_off_is_the_base_model(build, options):
    torch.manual_seed(0)
    base = build().eval()
    model = adapted(build, **options).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    x = BATCHES[build]()
    changed = model(x)
    assert not torch.equal(changed, base(x))
    with ll.adapters_off(model):
        assert torch.equal(model(x), base(x))
        with torch.enable_grad():
            torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(model(x), changed)
    ll.merge(model)
    with ll.adapters_off(model):
        assert torch.equal(model(x), base(x))
    torch.testing.assert_close(model(x), changed, rtol=1e-4, atol=1e-5)


@pairs
def test_merge_equals_unmerged_and_unmerge_restores(build, options):
    model = adapted(build, **options).eval()
    x = BATCHES[build]()
    before = model(x)
    weights = base_weights(model)
    ll.merge(model)
    merged = model(x)
    assert (before - merged).abs().max() <= 1e-5 * before.abs().max()
    ll.merge(model)
    assert torch.equal(model(x), merged)
    ll.unmerge(model)
    ll.unmerge(model)
    assert all(torch.equal(weight, weights[n]) for n, weight in base_weights(model).items())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("build", MODELS)
def test_original_checkpoint_loads_after_injection(build):
    original = build().state_dict()
    torch.manual_seed(5)
    model = build()
    ll.inject(model, ll.LoRAConfig(rank=2))
    result = model.load_state_dict(original, strict=False)
    assert not result.unexpected_keys
    assert all(".lora." in n for n in result.missing_keys)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in original.items())


@pytest.mark.parametrize("build", MODELS)
def test_deepcopy_and_pickle_keep_the_function(build):
    model = adapted(build).eval()
    x = BATCHES[build]()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        twin.train()
        assert not any(m.training for m in twin.modules() if isinstance(m, nn.BatchNorm2d))
        ll.eject(twin)
        assert lora_layers(model)
        assert not lora_layers(twin)


slow_models = [pytest.param(build, marks=pytest.mark.slow) for build in MODELS]


@pytest.mark.parametrize("build", [Mixture, *slow_models])
def test_compile_without_graph_break(build):
    model = adapted(build).train()
    x = BATCHES[build]()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [Mixture, *slow_models])
def test_export(build):
    model = adapted(build).eval()
    x = BATCHES[build]()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [mlp, cnn, vit])
def test_half_precision_base_keeps_float32_updates(build):
    model = build().bfloat16()
    ll.inject(model, ll.LoRAConfig(rank=2))
    assert {p.dtype for p in ll.lora_parameters(model)} == {torch.float32}
    y = model(BATCHES[build]().bfloat16())
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None for p in ll.lora_parameters(model))
    ll.merge(model)
    assert all(layer.weight.dtype is torch.bfloat16 for layer in lora_layers(model).values())


@pytest.mark.parametrize("build", [mlp, cnn, vit])
def test_autocast(build):
    model = adapted(build).eval()
    x = BATCHES[build]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        weight = next(iter(lora_layers(model).values())).weight
    assert weight.dtype is torch.float32
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05 * float(model(x).abs().max()))


def test_dropout_acts_on_the_update_alone_and_in_train_mode_alone():
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 2))
    ll.inject(model, ll.LoRAConfig(rank=2, dropout=0.5, target_modules=["0"]))
    layer, x = model[0], torch.randn(4, 50)
    with torch.no_grad():
        layer.lora["default"]["weight"].lora_B.normal_()
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_eval_model_stays_in_eval():
    model = vit().eval()
    ll.inject(model, ll.LoRAConfig(rank=2, dropout=0.5))
    assert not any(m.training for m in model.modules())
