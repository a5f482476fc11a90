"""int8 files of onnxruntime: smaller, near the model, fixed tables in floats; and what is refused."""

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ConfigError, UserError


class Heard(nn.Module):
    """A fixed table of a huge range before what trains."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.rand(64, 64) * torch.logspace(-5, 5, 64)[:, None])
        self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 8)

    def forward(self, power):  # (batch, 64)
        return self.head(self.body((power @ self.table + 1e-6).log()))


def test_static_int8_is_smaller_and_near_and_leaves_tables_alone(tmp_path):
    torch.manual_seed(0)
    model = Heard().eval()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["body.0"], modules_to_save=["head"]))
    inputs = [torch.rand(4, 64) for _ in range(8)]
    told = ll.export(model, inputs[0], tmp_path / "int8", quantize="static", calibration=inputs)
    assert told.bytes < 0.5 * 4 * sum(p.numel() for p in model.parameters())
    assert 1e-4 < told.difference < 0.1 and "int8 (static)" in str(told)
    import onnx

    graph = onnx.load(tmp_path / "int8" / "model.onnx").graph
    floats = [i.dims for i in graph.initializer if i.data_type == 1 and len(i.dims) > 1]
    assert [list(dims) for dims in floats] == [[64, 64]]
    assert "int8 (static)" in (tmp_path / "int8" / "README.md").read_text()


class Spoken(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(40, 64, batch_first=True), nn.Linear(64, 29)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


FRAMES = {"x": {0: "batch", 1: "frames"}}


def test_the_loop_of_a_compressed_lstm_is_in_int8(tmp_path):
    model = Spoken().eval()
    ll.compress(model, ranks={"lstm": 24}, plain=True, data=[torch.randn(2, 9, 40)])
    assert model.lstm.proj_size == 24
    told = ll.export(model, torch.randn(2, 9, 40), tmp_path / "out", dynamic=FRAMES, quantize="dynamic")
    assert told.difference < 0.1
    import onnx

    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert not [i.dims for i in graph.initializer if i.data_type == 1 and len(i.dims) > 1]
    loops = [a.g for node in graph.node for a in node.attribute if a.name == "body"]
    kinds = [node.op_type for loop in loops for node in loop.node]
    assert kinds.count("MatMulInteger") == 2 and "MatMul" not in kinds


@pytest.mark.slow
def test_dynamic_int8_of_an_lstm_and_a_refusal_where_it_gains_nothing(tmp_path):
    model = Spoken().eval()
    told = ll.export(model, torch.randn(2, 9, 40), tmp_path / "out", dynamic=FRAMES, quantize="dynamic")
    assert told.bytes < 0.5 * 4 * sum(p.numel() for p in model.parameters()) and told.difference < 0.1
    convolutions = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    with pytest.raises(UserError, match=r"few of them are weights in MatMul.*quantize='static'"):
        ll.export(convolutions, torch.randn(2, 3, 8, 8), tmp_path / "none", quantize="dynamic")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_mistakes_are_told_before_anything_is_written(tmp_path):
    model, x = nn.Linear(6, 3), torch.randn(2, 6)
    for text, options in {
        "a few dozen inputs": {"quantize": "static"},
        "needs none|takes none": {"quantize": "dynamic", "calibration": [x]},
        "leave it out, or give quantize='static'": {"calibration": [x]},
        "not with format='pt2'": {"quantize": "dynamic", "format": "pt2"},
        "give one of|Did you mean": {"quantize": "statik"},
    }.items():
        with pytest.raises(ConfigError, match=text):
            ll.export(model, x, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())
