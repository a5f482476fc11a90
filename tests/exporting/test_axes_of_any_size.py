"""export: sizes of dynamic axes, those that are tried and those at which a model goes another way."""

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import UserError
from lora_lightning.exporting import checks, onnx


def test_fresh_inputs_have_two_sizes_and_other_values():
    example = {"waves": torch.randn(2, 100) + 5, "lengths": torch.tensor([100, 60])}
    axes = {"waves": {0: "batch", 1: "samples"}, "lengths": {0: "batch"}}
    small, large = checks.fresh_inputs(example, axes)
    assert [tuple(v.shape) for v in small.values()] == [(1, 100), (1,)]
    assert [tuple(v.shape) for v in large.values()] == [(3, 150), (3,)]
    assert abs(large["waves"].mean() - 5) < 0.5 and {*large["lengths"].tolist()} <= {100, 60}
    assert len(checks.fresh_inputs(example, {})) == 1


class Branching(nn.Module):
    """Of a size on which it decides which way it goes."""

    def __init__(self, axis, decides):
        super().__init__()
        self.layer, self.axis, self.decides = nn.Linear(6, 6), axis, decides

    def forward(self, x):
        return self.layer(x) if self.decides(x.shape[self.axis]) else 2 * self.layer(x)


@pytest.mark.parametrize(
    ("given", "decides", "where"),
    [
        (2, lambda n: n < 5, "axis 1 of x is 5"),
        (2, lambda n: n % 2 == 0, "axis 1 of x is 3"),
        (3, lambda n: n % 2 == 0, "axis 1 of x is 4"),
        (2, lambda n: n != 7, "axis 1 of x is 7"),
    ],
)
@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_model_that_goes_another_way_for_other_sizes_is_refused(format, given, decides, where, tmp_path):
    axes = {"x": {0: "batch", 1: "frames"}}
    model = Branching(1, decides)
    with pytest.raises(ll.UserError, match=f"another way where {where}, and a file has one way alone"):
        ll.export(model, torch.randn(2, given, 6), tmp_path / "out", format=format, dynamic=axes)
    assert not [*tmp_path.iterdir()]


class Padding(nn.Module):
    """Pads where there is something to pad."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 4, 4)

    def forward(self, x):
        pad = -x.shape[2] % 4
        return self.layer(nn.functional.pad(x, (0, 0, 0, pad)) if pad else x)


def test_a_branch_that_changes_nothing_is_no_other_way(tmp_path):
    axes = {"x": {0: "batch", 2: "height"}}
    ll.export(Padding(), torch.randn(2, 3, 7, 8), tmp_path / "out", dynamic=axes)
    run = onnx.load(tmp_path / "out")
    for height in range(4, 13):
        x = torch.randn(2, 3, height, 8)
        assert run({"x": x.numpy()})[0].shape[2] == -(-height // 4)
    with pytest.raises(ll.UserError, match="another way where axis 2 of x is 9"):
        ll.export(Padding(), torch.randn(2, 3, 8, 8), tmp_path / "none", format="pt2", dynamic=axes)


class Fixed(nn.Module):
    """Takes batches of two alone."""

    def forward(self, x):
        return x.view(2, 6) @ torch.ones(6, 3)


def test_a_model_that_fixes_an_axis_or_cannot_be_traced(tmp_path):
    with pytest.raises(
        UserError, match="does not allow other sizes of all its dynamic axes: axis 0 of x is always 2"
    ) as caught:
        ll.export(Fixed(), torch.randn(2, 6), tmp_path / "out", format="pt2", check=[torch.randn(2, 6)])
    assert "\n" not in str(caught.value)

    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(UserError, match=r"torch\.export cannot take Branches") as caught:
        ll.export(Branches(), torch.ones(2, 3), tmp_path / "out", format="pt2")
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]
