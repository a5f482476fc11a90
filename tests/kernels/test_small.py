"""Small layers take plain operations by a rule over their shapes: the same results, and when."""

import pytest
import torch
import torch.nn.functional as F

from lora_lightning.kernels import conv, conv_form, linear_form
from lora_lightning.kernels.functional import lora_conv, lora_linear

pytestmark = pytest.mark.shipped_threshold


def tensors(x, out, *kernel, groups=1, rank=2, dtype=torch.float64, trains=True):
    """x, W, b, A and B."""
    inside = x[-1] if not kernel else x[1] // groups
    shapes = (x, (out, inside, *kernel), (out,), (rank * groups, inside, *kernel), (out, rank))
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    for i in (0, 2, 3, 4) if trains else ():
        made[i].requires_grad_()
    return made


def with_gradients(function, given):
    y = function(*given)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    trained = [t for t in given if t.requires_grad]
    return [y, *torch.autograd.grad((y.square() * weights).sum(), trained)]


# form -> x, d_out and rank of a linear layer that takes it
LINEAR = {
    "dense": ((4, 30, 8), 12, 2),
    "plain": ((1, 300), 200, 2),
    "function": ((20_000, 8), 8, 2),
}


@pytest.mark.parametrize("form", LINEAR)
def test_a_linear_layer_of_every_form(form):
    shape, out, rank = LINEAR[form]
    given = tensors(shape, out, rank=rank)
    assert linear_form.linear_spec(*given, 2.0, None, 0.0, "auto", None).form == form
    assert linear_form.linear_spec(*given, 2.0, None, 0.0, "keep_inputs", None).form == "function"
    assert linear_form.linear_spec(*given, 2.0, None, 0.0, "reference", None).form == "plain"
    found, reference = (
        with_gradients(lambda *g, name=name: lora_linear(*g, 2.0, implementation=name), given)
        for name in ("auto", "reference")
    )
    for one, other in zip(found, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    if form != "function":
        small = tensors((3, 4), 3)
        assert torch.autograd.gradcheck(lambda *g: lora_linear(*g, 2.0), small)
        assert torch.autograd.gradgradcheck(lambda *g: lora_linear(*g, 2.0), small)


@pytest.mark.parametrize("form", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("grad", [True, False])
def test_no_update_gives_the_base_layers_very_bits(form, dtype, dropout, grad):
    shape, out, rank = LINEAR[form]
    given = tensors(shape, out, rank=rank, dtype=dtype, trains=False)
    given[4].zero_()
    given[3].requires_grad_(grad)
    y = lora_linear(*given, 2.0, dropout=dropout)
    assert y.requires_grad == grad and torch.equal(y, F.linear(*given[:3]))


CONV = {
    "summed": ((2, 6, 5, 5), 8, {}),
    "summed-depthwise": ((2, 6, 5, 5), 6, {"groups": 6}),
    "summed-groups": ((2, 6, 5, 5), 8, {"groups": 2, "stride": 2}),
    "reference": ((1, 96, 3, 3), 96, {}),
}


@pytest.mark.parametrize("name", CONV)
def test_a_convolution_of_every_form(name):
    shape, out, options = CONV[name]
    depthwise = "depthwise" in name
    given = tensors(shape, out, 3, 3, groups=1 if depthwise else options.get("groups", 1))
    if depthwise:
        given[1] = torch.randn(out, 1, 3, 3, dtype=torch.float64)
        given[3] = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    groups = options.get("groups", 1)
    form = conv_form.choose_form(*given, None, (1, 1), groups, 0.0, torch.float64, "auto")
    assert form == name.split("-")[0]
    kept = conv_form.choose_form(*given, None, (1, 1), groups, 0.0, torch.float64, "keep_inputs")
    assert kept not in conv.PLAIN_FORMS
    found, reference = (
        with_gradients(
            lambda *g, way=way: lora_conv(*g, 2.0, padding=1, implementation=way, **options), given
        )
        for way in ("auto", "reference")
    )
    for one, other in zip(found, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        given[4].zero_()
        y = lora_conv(*given, 2.0, padding=1, **options)
        assert torch.equal(y, F.conv2d(*given[:3], padding=1, **options))


def test_half_precision_dropout_and_quantized_weights_are_never_summed():
    """The small updates of the first steps would be rounded away, the branch alone drops entries, and the sum
    would be saved in floats."""
    from lora_lightning.kernels.quantized_tensor import QuantizedTensor

    given = tensors((30, 8), 8, dtype=torch.float32)
    assert linear_form.linear_spec(*given, 2.0, None, 0.0, "auto", None).form == "dense"
    assert linear_form.linear_spec(*given, 2.0, None, 0.5, "auto", None).form == "plain"
    half = [t.detach().bfloat16() for t in given]
    assert linear_form.linear_spec(*half, 2.0, None, 0.0, "auto", None).form == "plain"
    given[1] = QuantizedTensor.of(given[1], "int8")
    assert linear_form.linear_spec(*given, 2.0, None, 0.0, "auto", None).form == "plain"
    images = tensors((2, 6, 5, 5), 8, 3, 3, dtype=torch.float32)
    for dtype, dropout in ((torch.bfloat16, 0.0), (torch.float32, 0.5)):
        assert conv_form.choose_form(*images, None, (1, 1), 1, dropout, dtype, "auto") == "reference"
