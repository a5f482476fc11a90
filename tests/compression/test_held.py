"""Matrices that are read and not called, and tables of embeddings: products of fewer parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import BATCHES, encoder, pretrained
from torch import nn

import lora_lightning as ll


class Read(nn.Module):
    """A linear layer whose weight is read under another name, which only data show."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x):
        return F.linear(x, getattr(self, "layer").weight)  # noqa: B009


def of_full_rank(model):
    told = ll.compress(copy.deepcopy(model), energy=0.5, plain=True)
    return {p.name: f"product:{min(p.shape)}" for p in told.layers}


@pytest.mark.parametrize("training", [False, True])
def test_at_full_rank_attention_computes_the_same_in_both_of_torchs_ways(training):
    """In eval mode without gradients torch's layer reads its own weights too, for its fast path."""
    model, x = pretrained(encoder).train(training), BATCHES[encoder]()
    with torch.no_grad():
        expected = model(x)
        ranks = of_full_rank(model)
        assert {n.rpartition(".")[2] for n in ranks} == {"in_proj", "out_proj", "linear1", "linear2"}
        ll.compress(model, ranks=ranks, data=[x])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_what_an_attention_loses_is_measured_on_the_data():
    """The error of the table is that of the projections of these inputs."""
    model, x = (
        nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)).eval(),
        torch.randn(9, 7, 16),
    )
    weight = model[0].self_attn.in_proj_weight.detach().clone()
    told = ll.compress(model, ranks={"0.self_attn.in_proj": 5}, data=[x]).layers[0]
    away = F.linear(x, model[0].self_attn.in_proj_weight - weight).norm() / F.linear(x, weight).norm()
    assert told.error == pytest.approx(away.item(), rel=1e-3)
    assert told.parameters == (48 * 16, 5 * (48 + 16))


def test_it_is_kept_trained_adapted_and_exported(tmp_path):
    model, x = pretrained(encoder).eval(), BATCHES[encoder]()
    told = ll.compress(model, parameters=0.6, data=[x])
    assert {p.form for p in told.layers} == {"product"}
    assert sum(p.numel() for p in model.parameters()) == told.parameters[1]
    ll.save_compressed(model, told, tmp_path / "smaller")
    again = ll.load_compressed(pretrained(encoder).eval(), tmp_path / "smaller")
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    before = again(x)
    ll.inject(again, ll.LoRAConfig(rank=2, target_modules="all"))
    torch.testing.assert_close(again(x), before)


@pytest.mark.parametrize("targets", ["auto", "all"])
def test_a_product_is_adapted_once_and_its_factor_by_no_name(targets):
    model, x = pretrained(encoder).eval(), BATCHES[encoder]()
    ll.compress(model, parameters=0.6, data=[x])
    whole = [p.name for p in ll.plan(pretrained(encoder), ll.LoRAConfig(target_modules=targets)).layers]
    planned = ll.plan(model, ll.LoRAConfig(rank=2, target_modules=targets))
    assert [p.name for p in planned.layers] == whole
    factor = "layers.0.self_attn.parametrizations.in_proj_weight.0"
    assert planned.skipped[factor] == "computes another layer's weight: adapt that layer"
    with pytest.raises(ll.ConfigError, match="adapt that layer"):
        ll.plan(model, ll.LoRAConfig(target_modules=[factor]))


def test_a_weight_that_only_data_show_to_be_read(tmp_path):
    model, x = nn.Sequential(Read(), nn.Linear(12, 12)), torch.randn(20, 12)
    told = ll.compress(model, ranks={"0.layer": 4}, data=[x])
    assert told.layers[0].form == "product"
    ll.save_compressed(model, told, tmp_path / "smaller")
    again = ll.load_compressed(nn.Sequential(Read(), nn.Linear(12, 12)), tmp_path / "smaller")
    assert torch.equal(again(x), model(x))


def test_flops_are_not_saved_by_a_product():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), nn.Linear(16, 40)).eval()
    told = ll.compress(model, flops=0.9, data=[torch.randn(3, 7, 16)])
    assert [p.name for p in told.layers] == ["1"]
    assert told.dense["0.self_attn.in_proj"] == "its weight is read: a product has no fewer FLOPs"


def table(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 24, **options), nn.Linear(24, 3))


def test_a_table_of_embeddings_keeps_the_rows_that_are_looked_up(tmp_path):
    """Rows that the data show are nearer than those of the same rank by the weights alone; at full rank all
    are exact, and a row of zeros stays one."""
    model = table(padding_idx=3)
    words = torch.arange(12).repeat(40, 1)
    smaller, plain = copy.deepcopy(model), copy.deepcopy(model)
    told = ll.compress(smaller, ranks={"0": 8}, data=[words])
    ll.compress(plain, ranks={"0": 8}, plain=True)
    full = copy.deepcopy(model)
    ll.compress(full, ranks={"0": "embedding:24"}, data=[words])
    torch.testing.assert_close(full[0](torch.arange(50)), model[0](torch.arange(50)), rtol=1e-4, atol=1e-5)
    away = [(m[0](words) - model[0](words)).norm().item() for m in (smaller, plain)]
    assert away[0] < 0.8 * away[1]
    assert not smaller[0](torch.tensor([3])).any()
    assert told.layers[0].form == "embedding" and told.layers[0].parameters == (1200, 8 * 74)
    ll.save_compressed(smaller, told, tmp_path / "smaller")
    assert torch.equal(ll.load_compressed(table(padding_idx=3), tmp_path / "smaller")(words), smaller(words))


def test_a_table_that_rewrites_itself_is_left():
    told = ll.compress(table(max_norm=1.0), ranks={"1": 2}, plain=True)
    assert told.dense["0"] == "max_norm rewrites its weight in every forward"
