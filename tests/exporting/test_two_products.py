"""Products in the place of weights stay two products in exported files: smaller, and as the model is."""

import copy

import pytest
import torch
from torch import nn

import lora_lightning as ll

SIZE = 64


class Crossed(nn.Module):
    """An attention that reads another sequence: each of its projections takes a part of one weight."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, 4, batch_first=True)
        self.head = nn.Linear(SIZE, 8)

    def forward(self, x, other):
        return self.head(self.attention(x, other, other)[0])


def compressed(model, ranks, *inputs):
    torch.manual_seed(0)
    made = model().eval()
    return ll.compress(made, ranks=ranks, data=[inputs]), made


def layer():
    return nn.Sequential(nn.TransformerEncoderLayer(SIZE, 4, 128, dropout=0.0, batch_first=True))


def test_every_weight_of_an_attention_is_two_in_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    x = torch.randn(2, 5, SIZE)
    told, model = compressed(layer, {"*": 8}, x)
    assert {p.form for p in told.layers} == {"product"} and len(told.layers) == 4
    frames = {"src": {0: "batch", 1: "frames"}}
    exported = ll.export(model[0], x, tmp_path / "out", dynamic=frames)
    assert exported.difference < 1e-5
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    matrices = sorted(tuple(i.dims) for i in graph.initializer if len(i.dims) == 2)
    assert sum(a * b for a, b in matrices) == sum(p.parameters[1] for p in told.layers)
    assert all(8 in shape for shape in matrices)


@pytest.mark.parametrize("rank", [8, 60])
def test_parts_of_a_product_and_what_would_cost_more_stay(rank, tmp_path):
    x, other = torch.randn(2, 5, SIZE), torch.randn(2, 7, SIZE)
    _, model = compressed(Crossed, {"attention.*": rank}, x, other)
    before = copy.deepcopy(model)
    ll.export(model, (x, other), tmp_path / "out", format="pt2", dynamic=False)
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    widths = {
        n.meta["val"].shape[-1] for n in program.graph.nodes if n.target is torch.ops.aten.linear.default
    }
    assert (rank in widths) == (rank == 8)  # the output's projection alone
    torch.testing.assert_close(program.module()(x, other)[0], before(x, other))
