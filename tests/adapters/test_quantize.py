"""quantize: everything works as on a model that holds the rounded weights as floats."""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import FSDPStrategy
from small import BATCHES, Classifier, encoder, loader, mlp, moved, pretrained, trainer, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.trainer.strategies import refuse_quantized

KINDS = ("int8", "nf4")
EVERYTHING = ll.LoRAConfig(rank=2, target_modules="all")


def floats(model: nn.Module) -> nn.Module:
    """A copy that holds the rounded weights as plain parameters."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, QuantizedTensor):
                module._parameters[name] = nn.Parameter(weight.dequantize(), requires_grad=False)
    return model


def step(model: nn.Module, x: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    """Outputs and gradients, that of x included."""
    torch.manual_seed(3)
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [mlp, vit, encoder])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"dropout": 0.5}, {"implementation": "reference"}, {"train_bias": "all"}],
)
def test_a_step_is_that_of_the_rounded_weights(kind, build, options):
    if build is encoder and options.get("dropout"):
        pytest.skip("layers that are read by their weight refuse dropout")
    model, x = pretrained(build), BATCHES[build]()
    assert ll.quantize(model, kind)
    plain = floats(model)
    config = ll.LoRAConfig(rank=2, target_modules="all", **options)
    for each in (model, plain):
        torch.manual_seed(1)
        ll.inject(each, config)
    torch.testing.assert_close(step(model, x), step(plain, x), rtol=1e-4, atol=1e-6)
    for each in (model, plain):
        moved(each)
    for autocast in (False, True):
        close = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(step(model, x, autocast), step(plain, x, autocast), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_injection_and_adapters_off_leave_the_very_bits(kind):
    model, x = pretrained(vit), BATCHES[vit]()
    ll.quantize(model, kind)
    before = model(x)
    ll.inject(model, EVERYTHING)
    assert torch.equal(model(x), before)
    moved(model)
    assert not torch.equal(model(x), before)
    with ll.adapters_off(model):
        assert torch.equal(model(x), before)
    ll.eject(model)
    assert torch.equal(model(x), before)
    assert isinstance(model.blocks[0].attn.qkv._parameters["weight"], QuantizedTensor)


@pytest.mark.parametrize("adapted", [True, False])
def test_no_matrix_of_floats_is_kept(adapted):
    """Neither in the model nor for the backward, in layers that are adapted and in those between."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 2))
    ll.quantize(model, "int8")
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0", "1"] if adapted else ["0"]))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(4, 256, requires_grad=True))
    assert saved and all(t.numel() < 256 * 256 or isinstance(t, QuantizedTensor) for t in saved)
    weight = model[1]._parameters["weight"]
    assert weight.codes.nbytes + weight.scales.nbytes < 0.27 * 4 * weight.numel()


def test_function_transforms_forward_mode_and_second_derivatives():
    model, x = pretrained(mlp), BATCHES[mlp]()
    ll.quantize(model, "int8")
    plain = floats(model)
    config = ll.LoRAConfig(rank=2, target_modules=["0"])  # one that is adapted and one that is not
    found = []
    for each in (model, plain):
        ll.inject(each, config)
        moved(each)
        trained = {n: p.detach() for n, p in each.named_parameters() if "lora_" in n}

        def loss(values, row, each=each):
            return torch.func.functional_call(each, values, (row[None],)).square().sum()

        rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
        tangent = torch.func.jvp(lambda t, each=each: each(t), (x,), (torch.ones_like(x),))[1]
        t = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(each(t).square().sum(), t, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), t)
        found.append([*rows.values(), tangent, second])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_adapters_mixed_and_combined():
    model, x = pretrained(vit), BATCHES[vit]()
    ll.quantize(model, "int8")
    base = model(x)
    ll.inject(model, EVERYTHING, adapter="one")
    ll.add_adapter(model, "two")
    moved(model)
    with torch.inference_mode(), ll.mixed_adapters(model, ["one", None]):
        mixed = model(x)
    torch.testing.assert_close(mixed, torch.stack([model(x)[0], base[1]]), rtol=1e-4, atol=1e-5)
    assert max(ll.combine(model, ["one", "two"], [1.0, 0.0], into="three").values()) < 1e-5
    whole = model(x)
    ll.set_adapter(model, "three")
    torch.testing.assert_close(model(x), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind):
    model, x = pretrained(vit), BATCHES[vit]()
    ll.quantize(model, kind)
    ll.inject(model, EVERYTHING)
    y = moved(model)(x)
    rounded = model.blocks[0].attn.qkv._parameters["weight"]
    ll.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    model.double()
    kept = model.blocks[0].attn.qkv._buffers["lora_unmerged_weight"]  # moved with the model
    ll.unmerge(model)
    assert model.blocks[0].attn.qkv._parameters["weight"] is rounded and rounded.dtype == torch.float64
    assert rounded.codes is kept.codes and rounded.scales is kept.scales
    model.float()
    assert torch.equal(model(x), y)


def test_ejected_with_its_updates_it_is_a_plain_model():
    model, x = pretrained(vit), BATCHES[vit]()
    ll.quantize(model, "int8")
    ll.inject(model, EVERYTHING)
    y = moved(model)(x)
    ll.eject(model, merged=True)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())


@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
def test_a_trainer_fits_and_resumes(checkpoint, tmp_path):
    def module() -> Classifier:
        made = Classifier(pretrained(vit), lr=0.01)
        ll.quantize(made, "int8")
        torch.manual_seed(4)  # A begins with what is drawn next
        return made

    callback = {"rank": 2, "checkpoint": checkpoint}
    trainer(tmp_path, ll.LoRACallback(**callback), max_epochs=2).fit(whole := module(), loader(vit))
    first = trainer(tmp_path, ll.LoRACallback(**callback), max_epochs=1)
    first.fit(module(), loader(vit))
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, ll.LoRACallback(**callback), max_epochs=2).fit(
        resumed := module(), loader(vit), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    weight = resumed.model.blocks[0].attn.qkv
    assert any(p.any() for n, p in weight.named_parameters() if "lora_B" in n)
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_head_and_what_it_shares_stay_in_floats():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.inner, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
            self.out.weight = self.embedding.weight

    model = Tied()
    assert ll.quantize(model, "int8") == ["inner"]
    assert type(model.out.weight) is nn.Parameter
    twice = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    twice[1].weight = twice[0].weight
    assert ll.quantize(twice, "int8") == ["0", "1"] and twice[0].weight is twice[1].weight


def test_what_is_excluded_may_train_in_full():
    model = pretrained(vit)
    ll.quantize(model, "int8", exclude_modules=["blocks.1.mlp"])
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["qkv"], modules_to_save=["blocks.1.mlp"]))
    assert model.blocks[1].mlp.fc1.weight.requires_grad
    assert isinstance(model.blocks[0].mlp.fc1.weight, QuantizedTensor)


def test_outside_the_backbone_nothing_is_rounded():
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.neck, self.head = pretrained(mlp), nn.Linear(3, 8), nn.Linear(8, 3)

    module = Module()
    assert ll.quantize(module, "int8") == ["backbone.0", "backbone.3"]
    assert module.neck.weight.requires_grad


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: ll.quantize(m, "nf5"), r"kind='nf5': give one of int8, nf4\. Did you mean 'nf4'\?"),
        (lambda m: ll.quantize(m, "int8", ["blocks.7"]), "exclude_modules: 'blocks.7' matches no layer"),
        (lambda m: ll.quantize(m, "int8", ["blocks"]), "quantize='int8': the model has no linear layer left"),
        (lambda m: ll.quantize(m.to("meta"), "int8"), r"blocks\.0\.attn\.qkv\.weight has no memory"),
        (lambda m: (ll.inject(m), ll.quantize(m, "int8")), "adapted already: call quantize before"),
    ],
)
def test_refusals_leave_the_model_alone(call, told):
    model = pretrained(vit)
    with pytest.raises((ll.ConfigError, ll.UserError), match=told):
        call(model)
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())


def test_a_quantized_module_cannot_train_in_full():
    model = pretrained(vit)
    ll.quantize(model, "int8")
    with pytest.raises(ll.ConfigError, match=r"modules_to_save: blocks\.1 cannot train in full, quantized"):
        ll.inject(model, ll.LoRAConfig(target_modules=["qkv"], modules_to_save=["blocks.1"]))


def test_strategies_that_shard_are_refused():
    module = Classifier(pretrained(vit))
    run = SimpleNamespace(strategy=FSDPStrategy())
    refuse_quantized(run, module)
    ll.quantize(module, "int8")
    with pytest.raises(ll.UserError, match=r"FSDPStrategy shards .* take strategy=\"ddp\""):
        refuse_quantized(run, module)


def test_lightnings_own_way_to_four_bits_is_refused(tmp_path):
    """It would replace the adapted layers, after setup, on a GPU."""
    run = trainer(tmp_path)
    run.strategy._precision_plugin = object.__new__(BitsandbytesPrecision)
    with pytest.raises(ll.ConfigError, match=r"BitsandbytesPrecision puts .* call lora_lightning\.quantize"):
        ll.LoRACallback(rank=2).setup(run, Classifier(pretrained(vit)), "fit")


def test_torchaos_tensors_are_refused():
    """Its operators lack what reading and merging take; nothing of it need be installed to see that."""
    foreign = type("Int8Tensor", (torch.Tensor,), {"__module__": "torchao.quantization"})
    model = pretrained(vit)
    weight = model.blocks[0].attn.qkv.weight.detach().as_subclass(foreign)
    model.blocks[0].attn.qkv._parameters["weight"] = weight
    with pytest.raises(ll.ConfigError, match=r"torchao's Int8Tensor: .* call lora_lightning\.quantize"):
        ll.plan(model, ll.LoRAConfig(target_modules=["blocks.0.attn.qkv"]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_on_a_gpu(kind, when):
    """Quantized there or brought there: a step is that of the rounded weights on the CPU."""
    model, x = pretrained(vit), BATCHES[vit]()
    if when == "before":
        model.cuda()
    ll.quantize(model, kind)
    plain = floats(model).cpu()
    model.cuda()
    for each in (model, plain):
        ll.inject(each, EVERYTHING)
    for one, other in zip(ll.lora_parameters(moved(plain)), ll.lora_parameters(model)):
        other.data.copy_(one)
    found = [t.cpu() for t in step(model, x.cuda())]
    torch.testing.assert_close(found, step(plain, x), rtol=1e-3, atol=1e-3)
    ll.merge(model)
    model.cpu()
    ll.unmerge(model)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiler_sees_through():
    model, x = pretrained(vit), BATCHES[vit]()
    ll.quantize(model, "int8")
    ll.inject(model, EVERYTHING)
    moved(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(compiled, x), step(model, x), rtol=1e-4, atol=1e-5)
