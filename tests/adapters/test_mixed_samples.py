"""Samples of one batch with an adapter each, against each by itself, for every layer family."""

import pytest
import torch
from families import CASES, Model, base_model, config, floats
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers

SAMPLES = ["one", "two", None, "one", "three", "two"]
ADAPTERS = [n for n in dict.fromkeys(SAMPLES) if n]
BATCHED = [n for n, case in CASES.items() if case.batch is not None and n != "Embedding-sparse"]
# Cases whose tensors have no batch dimension, and one-dimensional indices of another number.
REFUSED = [n for n in CASES if "unbatched" in n or n in ("EmbeddingBag-offsets", "Embedding-sparse")]


@torch.no_grad()
def several(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """A model with three adapters of different ranks, layers and kinds, all of which change something."""
    model = base_model(name, dtype).eval()
    targets = list(CASES[name].targets)
    transposed = any(s.transposed for s in _slots(model))
    ll.inject(model, config(name), adapter="one")
    ll.add_adapter(model, "two", config(name, rank=1, use_rslora=True, target_modules=targets[:1]))
    ll.add_adapter(model, "three", config(name, rank=1, alpha=3, use_dora=not transposed))
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        for adapter in layer.lora:
            for parameter in layer.lora[adapter].parameters():
                parameter.mul_(1.2) if parameter.dim() == 1 else parameter.normal_(std=0.3)
    ll.set_adapter(model, *ADAPTERS)
    return model


def _slots(model: nn.Module):
    from lora_lightning.planning.structure import targets_of

    return [t.slot for t in targets_of(model)[0].values()]


def whole_batch(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """The case's inputs with a sample for each of SAMPLES."""
    case = CASES[name]
    torch.manual_seed(3)
    many = [case.inputs(dtype) for _ in SAMPLES]
    inputs = [torch.cat(x, case.batch).narrow(case.batch, 0, len(SAMPLES)) for x in zip(*many)]
    shuffled = torch.randperm(7)
    return tuple(x if x.is_floating_point() else shuffled[(x + x.cumsum(0)) % 7] for x in inputs)


def alone(model: nn.Module, i: int, inputs: tuple[Tensor, ...], dim: int) -> list[Tensor]:
    sample = tuple(x.narrow(dim, i, 1) for x in inputs)
    if SAMPLES[i] is None:
        with ll.adapters_off(model):
            return list(floats(model(*sample)))
    ll.set_adapter(model, SAMPLES[i])
    outputs = list(floats(model(*sample)))
    ll.set_adapter(model, *ADAPTERS)
    return outputs


def loss(outputs: list[Tensor]) -> Tensor:
    return sum((y * y).sum() for y in outputs)


def output_dims(name: str, outputs: list[Tensor]) -> list[int]:
    """Attention weights have the batch first, whatever the inputs have; states of RNNs second."""
    batch = CASES[name].batch
    attention = isinstance(Model(name).layer, nn.MultiheadAttention)
    return [0 if attention and i else batch for i in range(len(outputs))]


@pytest.mark.parametrize("name", BATCHED)
def test_rows_and_gradients_are_those_of_each_row_alone(name):
    model, dim = several(name), CASES[name].batch
    inputs = whole_batch(name)
    differentiable = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    tensors = [*ll.lora_parameters(model), *differentiable]
    with ll.mixed_adapters(model, SAMPLES):
        mixed = list(floats(model(*inputs)))
        got = torch.autograd.grad(loss(mixed), tensors, allow_unused=True)
    wanted = [torch.zeros_like(t) for t in tensors]
    for i in range(len(SAMPLES)):
        outputs = alone(model, i, inputs, dim)
        for y, single, d in zip(mixed, outputs, output_dims(name, outputs)):
            torch.testing.assert_close(y.narrow(d, i, 1), single, rtol=1e-9, atol=1e-9)
        if not loss(outputs).requires_grad or "frequency" in name:
            continue  # scale_grad_by_freq divides by counts over a whole batch
        some = torch.autograd.grad(loss(outputs), tensors, allow_unused=True)
        wanted = [w if g is None else w + g for w, g in zip(wanted, some)]
    for gradient, expected in zip([] if "frequency" in name else got, wanted):
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", BATCHED)
def test_without_gradients_and_in_float32(name):
    model, inputs = several(name, torch.float32), whole_batch(name, torch.float32)
    with torch.no_grad():
        for _ in range(2):
            with ll.mixed_adapters(model, SAMPLES):
                mixed, again = (list(floats(model(*inputs))) for _ in range(2))
            for i in range(len(SAMPLES)):
                outputs = alone(model, i, inputs, CASES[name].batch)
                for y, second, single, d in zip(mixed, again, outputs, output_dims(name, outputs)):
                    torch.testing.assert_close(y.narrow(d, i, 1), single, rtol=1e-4, atol=1e-5)
                    assert torch.equal(y, second)
            for parameter in ll.lora_parameters(model):  # what is kept between calls must follow
                parameter.mul_(1.1)


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_without_rows_are_refused_by_name(name):
    model, inputs = several(name), CASES[name].inputs(torch.float64)
    before = [t.clone() for t in floats(model(*inputs))]
    with pytest.raises(ll.UserError, match=r"mixed_adapters: .*layer"), ll.mixed_adapters(model, SAMPLES):
        model(*inputs)
    for y, wanted in zip(floats(model(*inputs)), before):
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("name", ["LSTM-packed", "GRU-packed"])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(name, enforce_sorted):
    model = several(name)
    layer = model.layer
    x, lengths = torch.randn(6, 5, 5, dtype=torch.float64), torch.tensor([5, 4, 4, 3, 2, 1])
    if not enforce_sorted:
        lengths = lengths[torch.tensor([3, 1, 5, 0, 2, 4])]
    batch = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    ll.set_adapter(model, "one")
    plain = layer(batch)[0]
    with ll.mixed_adapters(model, SAMPLES):
        y, states = layer(batch)
    assert torch.equal(y.batch_sizes, plain.batch_sizes)
    assert (y.sorted_indices is None) == (plain.sorted_indices is None)
    padded, found = pad_packed_sequence(y, batch_first=True)
    assert torch.equal(found, lengths)
    for i, length in enumerate(lengths):
        single, state = _single(model, layer, SAMPLES[i], x[i : i + 1, :length])
        torch.testing.assert_close(padded[i, :length], single[0], rtol=1e-9, atol=1e-9)
        for many, one in zip(floats(states), floats(state)):
            torch.testing.assert_close(many[:, i], one[:, 0], rtol=1e-9, atol=1e-9)


def _single(model, layer, name, x):
    if name is None:
        with ll.adapters_off(model):
            return layer(x)
    ll.set_adapter(model, name)
    return layer(x)


def test_deep_recurrent_layers_with_the_batch_first():
    model = several("LSTM-deep")
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    with ll.mixed_adapters(model, SAMPLES):
        y, (h, c) = model(x)
    for i, name in enumerate(SAMPLES):
        single, (h_one, c_one) = _single(model, model.layer, name, x[i : i + 1])
        torch.testing.assert_close(y[i], single[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(h[:, i], h_one[:, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(c[:, i], c_one[:, 0], rtol=1e-9, atol=1e-9)


def test_dropout_is_each_rows_adapters_own():
    model = nn.Sequential(nn.Linear(400, 4))
    ll.inject(model, ll.LoRAConfig(rank=1, dropout=0.5, modules_to_save=None), adapter="dropping")
    ll.add_adapter(model, "none", ll.LoRAConfig(rank=1, modules_to_save=None))
    layer = model[0]
    with torch.no_grad():
        for adapter in ("dropping", "none"):
            layer.lora[adapter]["weight"].lora_A.fill_(1)
            layer.lora[adapter]["weight"].lora_B.fill_(1)
    x = torch.ones(3, 400)
    for train in (True, False):
        model.train(train)
        with ll.mixed_adapters(model, ["dropping", None, "none"]):
            y = model(x) - nn.functional.linear(x, layer.base_weight("weight"), layer.bias)
        ll.set_adapter(model, "none")
        torch.testing.assert_close(y[1:], torch.tensor([[0.0] * 4, [800.0] * 4]), atol=1e-3, rtol=0)
        assert (y[0] - 800).abs().max() < (200 if train else 1e-3)
        assert (y[0, 0] != 800) == train
