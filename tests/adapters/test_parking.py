"""Adapters taken out of a model and put back: the same outputs, and a model that holds what is at work."""

import pytest
import torch
from several import MODELS, OTHERS, two
from small import BATCHES

import lora_lightning as ll
from lora_lightning.adapters.parking import park, put_back, take_out
from lora_lightning.errors import UserError


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("build", MODELS)
def test_put_back_an_adapter_is_what_it_was(build, other: str) -> None:
    model, x = two(build, **OTHERS[other]), BATCHES[build]()
    samples = ["two" if i % 2 else None for i in range(len(x))]
    with torch.inference_mode(), ll.mixed_adapters(model, samples):
        before = model(x)
    parked = park(model, "two")
    assert ll.adapter_names(model) == ["one"]
    assert not [name for name, _ in model.named_parameters() if ".lora.two." in name]
    with torch.inference_mode(), ll.adapters_off(model):
        base = model(x)
    assert not torch.equal(base, before)
    put_back(model, parked)
    with torch.inference_mode(), ll.mixed_adapters(model, samples):
        assert torch.equal(model(x), before)
    take_out(model, parked)
    with torch.inference_mode(), ll.adapters_off(model):
        assert torch.equal(model(x), base)


def test_what_is_refused() -> None:
    model = two(MODELS[0])
    with pytest.raises(UserError, match="'one' is selected"):
        park(model, "one")
    parked = park(model, "two")
    with ll.adapters_off(model), pytest.raises(UserError, match="within adapters_off"):
        put_back(model, parked)
    put_back(model, parked)
    with pytest.raises(UserError, match="has an adapter 'two' already"):
        put_back(model, parked)
    with ll.adapters_off(model), pytest.raises(UserError, match="within adapters_off"):
        park(model, "two")
    assert ll.adapter_names(model) == ["one", "two"]
