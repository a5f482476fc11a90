"""Quantized bases and files: state dicts, pickles, adapters that come and go, merging without a model."""

import copy
import io

import pytest
import torch
from small import BATCHES, moved, pretrained, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.app.inspect import inspect
from lora_lightning.files.fingerprint import fingerprint_of
from lora_lightning.files.format import read_adapter
from lora_lightning.files.merge import merge_state
from lora_lightning.kernels.quantized_tensor import QuantizedTensor

KINDS = ("int8", "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_copies_files_and_pickles(kind, tmp_path):
    model, x = pretrained(vit), BATCHES[vit]()
    ll.quantize(model, kind)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = pretrained(vit)
    ll.quantize(other, kind)
    nn.init.zeros_(other.blocks[0].mlp.fc1.weight)
    assert not torch.equal(other(x), y)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(x), y) and fingerprint_of(other) == fingerprint_of(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), y)


def test_weights_in_floats_are_rounded_when_they_are_loaded():
    model, base = pretrained(vit), pretrained(vit)
    ll.quantize(model, "int8")
    values = QuantizedTensor.of(torch.randn(72, 24), "int8").dequantize()
    state = base.state_dict()
    state["blocks.0.attn.qkv.weight"] = values
    model.load_state_dict(state)
    assert torch.equal(model.blocks[0].attn.qkv.weight.dequantize(), values)
    base.load_state_dict(state)
    assert (
        fingerprint_of(model)["blocks.0.attn.qkv.weight"] == fingerprint_of(base)["blocks.0.attn.qkv.weight"]
    )


def test_an_adapter_goes_from_rounded_to_float_weights_and_back(tmp_path):
    model, base = pretrained(vit), pretrained(vit)
    assert fingerprint_of(model) == fingerprint_of(base)
    ll.quantize(model, "int8")
    assert fingerprint_of(model) == fingerprint_of(base)
    ll.inject(model, ll.LoRAConfig(rank=2))
    moved(model)
    ll.save_adapter(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"trained on weights in int8, .* Call lora_lightning\.quantize"):
        ll.load_adapter(base, tmp_path / "adapter")  # checked against the fingerprint
    x = BATCHES[vit]()
    assert (model(x) - base(x)).norm() < 0.05 * base(x).norm()
    other = pretrained(vit)
    ll.quantize(other, "int8")
    ll.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(x), model(x))
    wrong = vit()
    ll.quantize(wrong, "int8")
    with pytest.raises(ll.AdapterFileError, match="another base model"):
        ll.load_adapter(wrong, tmp_path / "adapter")


@pytest.mark.parametrize("merged", [False, True])
def test_a_file_is_merged_into_the_weights_that_it_was_trained_on(merged, tmp_path):
    """Also where the base comes as floats; what is quantized and not adapted is rounded too."""
    model, x = pretrained(vit), BATCHES[vit]()
    base = dict(pretrained(vit).state_dict())
    ll.quantize(model, "nf4")
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["qkv"]))
    y = moved(model)(x)
    if merged:
        ll.merge(model)
    ll.save_adapter(model, tmp_path / "adapter")
    plain = vit()
    plain.load_state_dict(merge_state(read_adapter(tmp_path / "adapter"), base).state)
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-5)
    assert "8 of them in nf4" in inspect(tmp_path / "adapter")
