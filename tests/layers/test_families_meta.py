"""A step of every family on the meta device, which has no values: nothing in a layer waits for a number of
the device or branches by one, so that steps can be captured as CUDA graphs and a host runs ahead of a GPU."""

import pytest
import torch
from families import CASES, adapted, config, run, same_flags, typical_cases
from torch import nn

import lora_lightning as ll


def step(model, inputs):
    """Forward, backward and the shapes of the outputs, in train mode."""
    outputs = run(model, inputs)
    torch.stack([y.sum() for y in outputs]).sum().backward()
    assert all(y.device.type == "meta" for y in outputs)
    return [y.shape for y in outputs]


def on_meta(name, model):
    """The model and inputs there; skipped where the base model itself needs values."""
    inputs = tuple(x.to("meta") for x in CASES[name].inputs())
    base, model = same_flags(name, model).to("meta"), model.to("meta")
    try:
        wanted = [y.shape for y in run(base, inputs)]
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"the base model itself: {str(error)[:80]}")
    return model, inputs, wanted


OPTIONS = {
    "plain": {"dropout": 0.0},
    "dropout": {"dropout": 0.5},
    "dora": {"dropout": 0.0, "use_dora": True},
}


@typical_cases
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_reads_no_value(name, options):
    try:
        model = adapted(name, **options)
    except ll.ConfigError as error:
        pytest.skip(f"not for this family: {error}")
    model, inputs, wanted = on_meta(name, model.train())
    assert step(model, inputs) == wanted
    assert all(p.grad is not None for p in ll.lora_parameters(model))


@typical_cases
def test_a_step_of_two_adapters_reads_no_value(name):
    model = adapted(name, dropout=0.0).train()
    ll.add_adapter(model, "two", config(name, rank=1))
    ll.set_adapter(model, "default", "two")
    model, inputs, wanted = on_meta(name, model)
    assert step(model, inputs) == wanted
    with ll.adapters_off(model), torch.no_grad():
        run(model, inputs)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_step_of_a_quantized_layer_reads_no_value(scheme):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    ll.quantize(model, scheme)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"], modules_to_save=None))
    model = model.to("meta")
    model(torch.empty(3, 64, device="meta")).sum().backward()
    assert all(p.grad is not None for p in ll.lora_parameters(model))
