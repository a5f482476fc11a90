"""What is kept of an adapted layer, for every family: files, copies, the base's own state, a plain layer."""

import copy
import io

import pytest
import torch
from families import (
    CASES,
    Model,
    adapted,
    base_model,
    config,
    equal,
    fill,
    loss,
    pickled_if_possible,
    run,
    typical_cases,
)
from torch.nn.utils.parametrize import is_parametrized

import lora_lightning as ll
from lora_lightning.layers.registry import LoRALayer, lora_layers


@typical_cases
def test_adapter_files(name, tmp_path):
    model, inputs = adapted(name).eval(), CASES[name].inputs()
    ll.save_adapter(model, tmp_path)
    fresh = base_model(name).eval()
    ll.load_adapter(fresh, tmp_path)
    assert equal(run(fresh, inputs), run(model, inputs))
    again = base_model(name).eval()
    ll.inject(again, config(name))
    ll.load_adapter(again, tmp_path)
    assert equal(run(again, inputs), run(model, inputs))


@typical_cases
def test_the_original_state_dict_still_loads(name):
    model, original = base_model(name), base_model(name).state_dict()
    ll.inject(model, config(name))
    result = model.load_state_dict(original, strict=False)
    assert not result.unexpected_keys and all(".lora." in n for n in result.missing_keys)


@typical_cases
def test_copies(name):
    model, inputs = adapted(name).eval(), CASES[name].inputs()
    run(model, inputs)
    wanted = run(model, inputs)
    twins = [copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), pickled_if_possible(model)]
    if "-norm" not in name:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins.append(torch.load(file, weights_only=False))
    for twin in twins:
        assert equal(run(twin, inputs), wanted)
        fill(twin), [p.data.mul_(2) for p in ll.lora_parameters(twin)]
        assert not equal(run(twin, inputs), wanted)
        ll.eject(twin)
    assert equal(run(model, inputs), wanted)


@typical_cases
@pytest.mark.parametrize("merged", [False, True])
def test_eject_gives_back_a_plain_model(name, merged):
    model, base, inputs = adapted(name).eval(), base_model(name).eval(), CASES[name].inputs()
    adapted_output = run(model, inputs)
    ll.eject(model, merged=merged)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    if merged:
        for one, other in zip(run(model, inputs), adapted_output, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()
        assert not any(isinstance(m, LoRALayer) for m in model.modules())
    else:
        assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()] or any(
            is_parametrized(m) for m in base.modules()
        )
        assert list(model.state_dict()) == list(base.state_dict())
        assert equal(run(model, inputs), run(base, inputs))
    for parameter in model.parameters():  # the plain layer computes with the parameters that it has
        parameter.data.mul_(0.5)
    assert not equal(run(model, inputs), adapted_output)
    loss(run(model.train(), inputs)).backward()
    if "EncoderLayer" not in name:
        assert all(p.grad is not None for p in model.parameters())
    ll.inject(model, config(name))
    assert equal(run(copy.deepcopy(model), inputs), run(model, inputs))


@typical_cases
def test_meta_device(name):
    with torch.device("meta"):
        model = Model(name)
    if config(name).use_dora:
        with pytest.raises(ll.ConfigError, match="meta"):
            ll.inject(model, config(name))
        assert not lora_layers(model)
        return
    planned = ll.inject(model, config(name))
    assert planned == ll.plan(base_model(name), config(name))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    for module in model.modules():
        for reset in ("_reset_parameters", "reset_parameters"):
            if hasattr(module, reset):
                getattr(module, reset)()
    for layer in lora_layers(model).values():
        for update in layer.lora["default"].values():
            W = update.slot.of(layer.base_weight(update.slot.parameter))
            assert update.product(W).eq(0).all()
            assert update.lora_A.any() or update.lora_B.any()
        if hasattr(layer.original_class, "reset_parameters") and not is_parametrized(layer):
            assert all(layer.base_weight(n).isfinite().all() for n in layer.properties)
