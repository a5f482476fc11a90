"""Updates stay float32 in a half-precision model, whoever makes it one."""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from small import Classifier, cnn, loader, mlp, moved, pretrained, trainer

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers
from lora_lightning.trainer.strategies import prepare_precision


class AtASmallRate(Classifier):
    def __init__(self) -> None:
        super().__init__(pretrained(mlp), lr=1e-4)


class AsItWas(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.values = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_hundred_small_steps_move_every_entry(precision, late, tmp_path):
    class Late(AtASmallRate):
        def configure_model(self) -> None:  # within the default dtype of the precision
            self.model = pretrained(mlp)

    module, before = (Late if late else AtASmallRate)(), AsItWas()
    callback = ll.LoRACallback(rank=2, use_dora=True, dropout=0.1, modules_to_save=None)
    run = trainer(tmp_path, callback, before, precision=precision, max_epochs=25)
    run.fit(module, loader(mlp))
    assert run.global_step == 100
    updates = {id(p) for p in ll.lora_parameters(module)}
    for name, parameter in module.named_parameters():
        if id(parameter) in updates:
            assert parameter.dtype == torch.float32
            assert (parameter != before.values[name]).all(), name
        else:
            assert parameter.dtype != torch.float32 and torch.equal(parameter, before.values[name])
    states = run.optimizers[0].state.values()
    assert {v.dtype for s in states for k, v in s.items() if k != "step"} == {torch.float32}
    weights = {layer.weight.dtype for layer in lora_layers(module).values()}
    assert weights == {torch.bfloat16 if "bf16" in precision else torch.float16}


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta", torch.float16),
        lambda m: m.type(torch.bfloat16),
        lambda m: copy.deepcopy(m).bfloat16(),
        lambda m: m.double().half(),
    ],
)
def test_every_conversion_keeps_the_updates_values(convert):
    model = pretrained(cnn)
    ll.inject(model, ll.LoRAConfig(rank=2, use_dora=True, target_modules=["3", "9"], modules_to_save=None))
    moved(model)
    before = [p.detach().clone() for p in ll.lora_parameters(model)]
    for parameter in ll.lora_parameters(model):
        parameter.grad = torch.full_like(parameter, 1 / 3)
    model = convert(model)
    for parameter, value in zip(ll.lora_parameters(model), before, strict=True):
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert parameter.is_meta or torch.equal(parameter, value)
        grad = parameter.grad
        assert grad is None or grad.is_meta or torch.equal(grad, torch.full_like(value, 1 / 3))
    assert {p.dtype for p in model[3]._parameters.values()} <= {torch.bfloat16, torch.float16}
    if model[3]._parameters["weight"].is_meta:
        model.to_empty(device="cpu")
        assert {p.dtype for p in ll.lora_parameters(model)} == {torch.float32}


def test_a_base_in_float64_takes_the_updates_along():
    model = pretrained(mlp)
    ll.inject(model, ll.LoRAConfig(rank=2))
    assert {p.dtype for p in ll.lora_parameters(model.double())} == {torch.float64}
    assert {p.dtype for p in ll.lora_parameters(model.float())} == {torch.float32}


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_in_half_precision_fills_float32_updates(assign):
    model = pretrained(mlp)
    ll.inject(model, ll.LoRAConfig(rank=2))
    state = {n: t.bfloat16() for n, t in moved(model).state_dict().items()}
    model.load_state_dict(state, assign=assign)
    updates = {
        n: p for n, p in model.named_parameters() if id(p) in {id(u) for u in ll.lora_parameters(model)}
    }
    assert updates and all(torch.equal(p, state[n].float()) for n, p in updates.items())


def test_strategies_that_want_one_dtype():
    plugin = SimpleNamespace(precision="bf16-true")
    module = Classifier(pretrained(mlp))
    ll.inject(module, ll.LoRAConfig(rank=2))
    made = {"__module__": "lightning.pytorch.strategies"}
    fsdp, deepspeed = (type(n, (), made)() for n in ("FSDPStrategy", "DeepSpeedStrategy"))
    with pytest.raises(ll.UserError, match=r"precision='bf16-true'.*Take precision=.bf16-mixed.*FSDP2"):
        prepare_precision(SimpleNamespace(strategy=fsdp, precision_plugin=plugin), module)
    prepare_precision(SimpleNamespace(strategy=deepspeed, precision_plugin=plugin), module)
    assert {p.dtype for p in ll.lora_parameters(module.bfloat16())} == {torch.bfloat16}
