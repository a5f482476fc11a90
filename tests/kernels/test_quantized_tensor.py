"""QuantizedTensor: how far it rounds, and what operations make of it."""

import pytest
import torch
import torch.nn.functional as F
from small import pretrained, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.kernels import quantized_tensor as quantized
from lora_lightning.kernels.quantized_tensor import QuantizedTensor

KINDS = ("int8", "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_how_far_the_rounded_weights_are(kind):
    W = torch.randn(32, 100)
    W[3] = 0
    rounded = QuantizedTensor.of(W, kind).dequantize()
    if kind == "int8":  # half a step of a row's scale
        assert ((rounded - W).abs() <= W.abs().amax(1, keepdim=True) / 127 * 0.5001).all()
    else:  # half the largest distance of two of the 16 values, times the largest of 64 entries
        error, size = (rounded - W).flatten().split(64), W.flatten().split(64)
        assert all((e.abs() <= s.abs().max() * 0.1525).all() for e, s in zip(error, size))
        assert 0.08 < (rounded - W).norm() / W.norm() < 0.1
    assert torch.equal(rounded[3], W[3])
    assert torch.equal(QuantizedTensor.of(rounded, kind).dequantize(), rounded)


def test_nf4_takes_an_eighth():
    weight = QuantizedTensor.of(torch.randn(64, 128), "nf4")
    assert weight.codes.nbytes + weight.scales.nbytes == 64 * 128 * (1 / 2 + 4 / 64)
    assert weight.to(torch.bfloat16).dequantize().dtype == torch.bfloat16
    assert weight.to(torch.float64).dequantize().dtype == torch.float64


def test_operations_in_place():
    W = torch.randn(8, 64)
    weight = QuantizedTensor.of(W, "int8")
    before, name = weight.dequantize(), weight.digest
    weight.copy_(before)
    assert torch.equal(weight.dequantize(), before) and weight.digest == name
    weight.mul_(2)
    assert torch.equal(weight.dequantize(), before * 2) and weight.digest != name
    with pytest.raises(NotImplementedError, match="cannot write into a quantized weight"):
        torch._foreach_mul_([weight], 2)
    with pytest.raises(NotImplementedError, match="cannot write"):
        torch.add(W, W, out=weight)


def test_inference_mode():
    layer = nn.Linear(64, 8)
    layer.weight = nn.Parameter(QuantizedTensor.of(layer.weight, "int8"), requires_grad=False)
    x = torch.randn(2, 64)
    with torch.inference_mode():
        y = layer(x)
        assert layer.weight.t().shape == (64, 8) and isinstance(layer.weight.detach(), QuantizedTensor)
    torch.testing.assert_close(y, F.linear(x, layer.weight.dequantize(), layer.bias))


def test_without_bitsandbytes_nf4_is_refused(monkeypatch):
    quantized._bitsandbytes.cache_clear()
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    model = pretrained(vit)
    with pytest.raises(ll.UserError, match=r"pip install 'lora-lightning\[nf4\]', or take int8"):
        ll.quantize(model, "nf4")
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
