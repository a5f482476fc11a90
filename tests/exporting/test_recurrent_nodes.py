"""Recurrent layers in ONNX: any number of frames, state in and out, projections as loops."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import lora_lightning as ll
from lora_lightning.errors import UserError
from lora_lightning.exporting import onnx
from lora_lightning.exporting.recurrent import recurrent_nodes

AXES = {0: "batch", 1: "frames"}


class Recurrent(nn.Module):
    """A network of several recurrent modules; the last one's state goes in and out."""

    def __init__(self, *layers, last):
        super().__init__()
        self.layers, self.last = nn.ModuleList(layers), last

    def forward(self, x, h, c=None):
        for layer in self.layers:
            x = layer(x)[0]
        x, state = self.last(x, h if c is None else (h, c))
        return (x, state) if c is None else (x, *state)


def exported(model, rows, folder, **options):
    """Two numbers of frames, neither of them the example's alone, and two batches are tried by `export`."""
    inputs = {"x": torch.randn(2, 7, 3), **{n: torch.randn(r, 2, w) for n, (r, w) in rows.items()}}
    axes = {"x": AXES, **{name: {1: "batch"} for name in rows}}
    return ll.export(model, inputs, folder, dynamic=axes, **options)


def test_frames_of_any_number(tmp_path):
    layers = nn.GRU(3, 5, batch_first=True, bidirectional=True), nn.RNN(10, 4, batch_first=True, bias=False)
    model = Recurrent(*layers, last=nn.LSTM(4, 6, batch_first=True)).eval()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    for parameter in ll.lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    told = exported(model, {"h": (1, 6), "c": (1, 6)}, tmp_path / "out")
    assert told.difference < 1e-5 and {one["x"][1] for one in told.sizes} == {7, 10}
    assert told.outputs == ("output_0", "output_1", "output_2")
    from onnx import load

    nodes = [node.op_type for node in load(tmp_path / "out" / "model.onnx").graph.node]
    assert {"GRU", "RNN", "LSTM"} <= {*nodes} and "Split" not in nodes


def test_the_model_is_as_before_and_a_packed_sequence_is_refused_by_name():
    model = nn.Sequential(nn.LSTM(3, 4))
    buffers = len([*model.buffers()])
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    with (
        recurrent_nodes(model),
        pytest.raises(UserError, match="0: gets a packed sequence, which ONNX does not have"),
    ):
        model(packed)
    assert type(model[0]) is nn.LSTM and len([*model.buffers()]) == buffers
    assert model(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "bidirectional", "projected"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_forms(kind, form, tmp_path):
    options = {
        "plain": {"nonlinearity": "relu"} if kind is nn.RNN else {},
        "bidirectional": {"bidirectional": True, "num_layers": 2},
        "projected": {"proj_size": 3, "bidirectional": True},
    }[form]
    if kind is not nn.LSTM and form == "projected":
        pytest.skip("only nn.LSTM has projections")
    model = Recurrent(last=kind(3, 5, batch_first=True, **options)).eval()
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    states = {"h": (rows, options.get("proj_size", 5)), "c": (rows, 5)}
    told = exported(model, states if kind is nn.LSTM else {"h": states["h"]}, tmp_path / "out")
    assert told.difference < 1e-5


class Heard(nn.Module):
    """A recognizer that takes its state and gives it back."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, 2, batch_first=True), nn.Linear(6, 5)

    def forward(self, frames, h, c):
        x, (h, c) = self.lstm(frames, (h, c))
        return {"logits": self.head(x), "h_after": h, "c_after": c}


def test_chunks_with_the_state_carried_over_are_the_whole(tmp_path):
    """Adapted, the file hears piece by piece what the model hears at once."""
    model = Heard().eval()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    for parameter in ll.lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    states = {name: torch.zeros(2, 2, 6) for name in ("h", "c")}
    axes = {"frames": AXES, **{name: {1: "batch"} for name in states}}
    ll.export(model, {"frames": torch.randn(2, 7, 8), **states}, tmp_path / "out", dynamic=axes)
    run, frames = onnx.load(tmp_path / "out"), torch.randn(3, 40, 8)
    state = [np.zeros((2, 3, 6), "float32")] * 2
    heard = []
    for piece in frames.split([16, 1, 20, 3], 1):
        logits, *state = run({"frames": piece.numpy(), "h": state[0], "c": state[1]})
        heard.append(torch.from_numpy(logits))
    with torch.no_grad():
        whole = model(frames, *[torch.zeros(2, 3, 6)] * 2)
    torch.testing.assert_close(torch.cat(heard, 1), whole["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(state[1]), whole["c_after"], rtol=1e-4, atol=1e-5)
