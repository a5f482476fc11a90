"""Embeddings: rows that never change, gradients that stay small, bags of every mode."""

import pytest
import torch
from families import CASES, EMBEDDING, adapted, loss, reference, reference_run, run
from torch import nn

import lora_lightning as ll


def train(model: nn.Module, indices: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(indices).square().sum().backward()
        optimizer.step()


def injected(layer: nn.Module) -> nn.Module:
    model = nn.Sequential(layer)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"], modules_to_save=None))
    return model


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_the_row_of_padding_idx_and_rows_never_seen_keep_their_values(kind, options, merged):
    layer = kind(9, 4, padding_idx=2, **options)
    before = layer.weight.detach().clone()
    model = injected(layer)
    train(model, torch.tensor([[0, 2, 5, 5], [2, 2, 7, 0]]))
    if merged:
        ll.merge(model)
    after = layer.weight.detach()
    changed = {i for i in range(9) if not torch.equal(before[i], after[i])}
    assert changed == {0, 5, 7}


def test_the_padding_row_of_a_bag_does_not_count():
    model = injected(nn.EmbeddingBag(9, 4, padding_idx=2, mode="mean"))
    train(model, torch.tensor([[0, 5]]))
    with_padding, without = model(torch.tensor([[0, 2, 5, 2]])), model(torch.tensor([[0, 5]]))
    torch.testing.assert_close(with_padding, without)


@pytest.mark.parametrize("name", [n for n in EMBEDDING if "max" not in n and "frequency" not in n])
def test_the_forward_never_makes_the_whole_table(name, monkeypatch):
    model = adapted(name)

    def read(self, parameter):
        raise AssertionError(f"{parameter} was read")

    monkeypatch.setattr("lora_lightning.layers.layer.LoRALayer.read", read)
    run(model, CASES[name].inputs())


def test_per_sample_weights_get_the_gradient_through_the_effective_table():
    name = "EmbeddingBag-weights"
    model = adapted(name, torch.float64)
    i, weights = CASES[name].inputs(torch.float64)
    weights.requires_grad_()
    plain, effective = reference(name, model)
    got = torch.autograd.grad(loss(run(model, (i, weights))), weights)
    wanted = torch.autograd.grad(loss(reference_run(plain, effective, (i, weights), False)), weights)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_per_sample_weights_of_a_half_precision_table():
    model = adapted("EmbeddingBag-weights", torch.bfloat16)
    i, weights = CASES["EmbeddingBag-weights"].inputs(torch.bfloat16)
    assert model(i, weights).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_index_out_of_range_is_refused_as_by_the_base(kind):
    with pytest.raises((IndexError, RuntimeError)) as base_error:
        kind(9, 4)(torch.tensor([[9]]))
    with pytest.raises(type(base_error.value)) as error:
        injected(kind(9, 4))(torch.tensor([[9]]))
    assert str(error.value) == str(base_error.value)
