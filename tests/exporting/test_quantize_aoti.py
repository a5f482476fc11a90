"""int8 of graphs that AOTInductor compiles: smaller, near the model, of any size, and run by torch alone."""

import json

import pytest
import torch
from test_quantize_executorch import Heard, Seen, weights
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _needs_it():
    pytest.importorskip("torchao")


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_int8_is_near_and_leaves_tables_alone(kind, tmp_path):
    model = Heard(1024).eval()
    inputs = [torch.rand(3, 64) * torch.logspace(-4, 4, 64) for _ in range(16)]
    options = {"calibration": inputs} if kind == "static" else {"check": inputs[:2]}
    told = ll.export(model, inputs[0], tmp_path / "out", format="aoti", quantize=kind, **options)
    assert (
        told.inputs == {"power": ("batch", 64)}
        and told.bytes < weights(model)
        and 1e-4 < told.difference < 0.1
    )
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["versions"].keys() == {"torch", "torchao"}
    assert "torchao" in (tmp_path / "out" / "README.md").read_text()
    run = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.pt2"))
    x = torch.cat(inputs[:3])
    with torch.no_grad():
        assert (run(x)[0] - model(x)).abs().max() < 0.1 * model(x).abs().max()


def test_static_int8_of_convolutions_and_a_refusal_where_dynamic_gains_nothing(tmp_path):
    model, inputs = Seen(384).eval(), [torch.rand(2, 3, 16, 16) for _ in range(16)]
    told = ll.export(model, inputs[0], tmp_path / "out", format="aoti", quantize="static", calibration=inputs)
    assert told.bytes < weights(model) and 1e-4 < told.difference < 0.1
    with pytest.raises(UserError, match=r"few of them are weights in linear layers.*quantize='static'"):
        ll.export(model, inputs[0], tmp_path / "none", format="aoti", quantize="dynamic")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_it_is_for_some_processors(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(UserError, match=r"for x86 processors, and this is aarch64: give format='onnx'"):
        ll.export(nn.Linear(6, 3), torch.randn(2, 6), tmp_path / "out", format="aoti", quantize="dynamic")
    assert not [*tmp_path.iterdir()]
