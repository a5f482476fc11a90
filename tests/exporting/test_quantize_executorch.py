"""int8 programs for ExecuTorch: smaller, near the model, fixed tables in floats; and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _needs_it():
    pytest.importorskip("executorch")


class Heard(nn.Module):
    """A fixed table, whose inputs are of all sizes, before what trains."""

    def __init__(self, width=256):
        super().__init__()
        self.register_buffer("table", torch.eye(64) + 1e-6)
        self.body = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 8)

    def forward(self, power):  # (batch, 64)
        return self.head(self.body((F.linear(power, self.table.T) + 1e-6).log()))


class Seen(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        convolutions = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3)
        self.body = nn.Sequential(*convolutions)
        self.head = nn.Linear(width, 8)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def weights(model):
    return 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_int8_is_smaller_and_near_and_leaves_tables_alone(kind, tmp_path):
    model = Heard().eval()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["body.0"], modules_to_save=["head"]))
    inputs = [torch.rand(1, 64) * torch.logspace(-4, 4, 64) for _ in range(16)]
    options = {"calibration": inputs} if kind == "static" else {"check": inputs}
    told = ll.export(
        model, inputs[0], tmp_path / "int8", format="executorch", dynamic=False, quantize=kind, **options
    )
    assert told.bytes < 0.5 * weights(model)
    assert 1e-4 < told.difference < 0.1 and f"int8 ({kind})" in str(told)
    assert f"int8 ({kind})" in (tmp_path / "int8" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8"]


def test_static_int8_of_convolutions_and_a_refusal_where_dynamic_gains_nothing(tmp_path):
    model, inputs = Seen().eval(), [torch.rand(1, 3, 16, 16) for _ in range(16)]
    words = {"format": "executorch", "dynamic": False}
    told = ll.export(model, inputs[0], tmp_path / "out", quantize="static", calibration=inputs, **words)
    assert told.bytes < 0.5 * weights(model) and 1e-4 < told.difference < 0.1
    with pytest.raises(UserError, match=r"few of them are weights in linear layers.*quantize='static'"):
        ll.export(model, inputs[0], tmp_path / "none", quantize="dynamic", **words)
    several = [torch.cat(inputs[:2])]
    with pytest.raises(UserError, match=r"x is \(2, 3, 16, 16\), and the file takes \(1, 3, 16, 16\)"):
        ll.export(model, inputs[0], tmp_path / "none", quantize="static", calibration=several, **words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


class Counted(nn.Module):
    """Whole numbers beside the layers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 256)

    def forward(self, x, lengths):  # (batch, 64), (batch,)
        return self.head(x), (lengths + 1) // 2


def test_whole_numbers_stay_whole(tmp_path):
    inputs = torch.randn(1, 64), torch.tensor([7])
    words = {"format": "executorch", "dynamic": False, "quantize": "dynamic"}
    told = ll.export(Counted().eval(), inputs, tmp_path / "out", **words)
    from lora_lightning.exporting.executorch import load

    _, halves = load(told.folder)({"x": inputs[0].numpy(), "lengths": inputs[1].numpy()})
    assert halves.tolist() == [4] and halves.dtype == "int64"
