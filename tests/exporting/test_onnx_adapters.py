"""One base and many adapters in onnxruntime, chosen in each request."""

import numpy as np
import pytest
import torch
from test_export import said
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import UserError
from lora_lightning.exporting.onnx_adapters import load


class Network(nn.Module):
    """Layers that take a branch (a convolution, linear layers) and those that do not."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mid, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.depthwise(self.norm(self.stem(x)).relu()).flatten(2).mT
        x = self.mid(self.attention(x, x, x)[0])
        return self.head(x.relu().mean(1))


def trained(model, *names):
    """With values in the adapters of these names, other ones in each."""
    for name in names:
        ll.set_adapter(model, name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_a_base_and_two_adapters(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = Network().eval()
    options = {"target_modules": "all", "modules_to_save": ["head"], "train_norm": "both"}
    ll.inject(model, ll.LoRAConfig(rank=2, **options), adapter="scottish")
    ll.add_adapter(
        model,
        "indian",
        ll.LoRAConfig(rank=3, alpha=5, target_modules=["mid", "stem"], modules_to_save=["head"]),
    )
    trained(model, "scottish", "indian")
    told = ll.export(model, torch.randn(1, 3, 6, 6), tmp_path / "out", format="onnx_adapters")
    assert told.difference < 1e-5
    assert {"base.onnx", "scottish.onnx_adapter", "indian.onnx_adapter"} < {*told.files}
    runs, x = load(tmp_path / "out"), torch.randn(4, 3, 6, 6)
    given = {}
    for name in ("indian", None, "scottish"):  # one session, an adapter a request
        given[name] = runs[name]({"x": x.numpy()})[0]
    with torch.no_grad():
        for name in ("scottish", "indian"):
            ll.set_adapter(model, name)
            np.testing.assert_allclose(given[name], model(x), rtol=1e-4, atol=1e-5)
        with ll.adapters_off(model):
            np.testing.assert_allclose(given[None], model(x), rtol=1e-4, atol=1e-5)
    assert (
        np.abs(given["indian"] - given["scottish"]).max() > 0.1 < np.abs(given["indian"] - given[None]).max()
    )
    base = said(tmp_path / "out", monkeypatch, capsys)
    assert base != said(tmp_path / "out", monkeypatch, capsys, "adapter=indian")
    with pytest.raises(SystemExit, match="adapter=irish: give one of indian, scottish"):
        said(tmp_path / "out", monkeypatch, capsys, "adapter=irish")


def test_dora_is_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None, use_dora=True))
    with pytest.raises(UserError, match=r"adapter 'default' is DoRA in 0\.weight.*format='onnx'"):
        ll.export(model, torch.randn(2, 4), tmp_path / "out", format="onnx_adapters")
    with pytest.raises(UserError, match="is not an adapted model"):
        ll.export(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "out", format="onnx_adapters")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_speech_with_recurrent_layers_and_two_lengths(tmp_path):
    class Recognizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm = nn.Conv1d(8, 12, 3, padding=1), nn.LSTM(12, 6, 2, bidirectional=True)
            self.head = nn.Linear(12, 5)

        def forward(self, mels):  # (batch, 8, frames)
            return self.head(self.lstm(self.conv(mels).permute(2, 0, 1))[0])

    model = Recognizer().eval()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=["head"]), adapter="one")
    ll.add_adapter(
        model, "two", ll.LoRAConfig(rank=3, target_modules=["lstm.weight_hh_l1"], modules_to_save=["head"])
    )
    trained(model, "one", "two")
    mels, axes = torch.randn(2, 8, 9), {"mels": {0: "batch", 2: "frames"}}
    told = ll.export(model, {"mels": mels}, tmp_path / "out", format="onnx_adapters", dynamic=axes)
    assert told.difference < 1e-5 and {one["mels"][2] for one in told.sizes} == {9, 13}
