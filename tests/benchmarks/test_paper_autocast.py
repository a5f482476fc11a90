"""Autocast on the device without data against CUDA's own, which casts without a GPU in a forward."""

import subprocess
import sys

import pytest

from benchmarks.paper_autocast import listed

# A process of its own: what makes the two devices stays in it.
COMPARISON = """
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.paper_autocast import Paper


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not str(func).startswith("prim"):
            self.seen.append((str(func), str([(t.dtype, t.shape, t.stride()) for t in found])))
        return out


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.frozen, self.layer = nn.Linear(8, 8).requires_grad_(False), nn.LayerNorm(8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        x = F.gelu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        z = self.layer(x)
        x = x + (x @ x.mT).softmax(-1) @ z + self.attention(x, x, x)[0]
        x = x + self.frozen(x) + self.frozen(x).exp()
        x = torch.cat([x, z], 1).sum(1) + torch.addcmul(x[:, 0], x[:, 1], z[:, 2])
        return self.head(x) + self.head(x)


def loss(net):
    return F.cross_entropy(net(torch.empty(2, 3, 10, 10)), torch.zeros(2, dtype=torch.long))


mode = FakeTensorMode()
net = Net().to("meta")._apply(lambda t: FakeTensor(mode, t.detach(), torch.device("cuda:0")))
torch.set_autocast_enabled("cuda", True)
torch.set_autocast_dtype("cuda", torch.bfloat16)
torch.autocast_increment_nesting()
with mode, torch.device("cuda"), Log() as cuda:
    loss(net)
torch.set_autocast_enabled("cuda", False)

paper = Paper()
net = paper.move(Net().to("meta"))
with torch.device("paper"), Log() as ours, paper.autocast():
    made = loss(net)
assert len(cuda.seen) > 80 and sorted(cuda.seen) == sorted(ours.seen)
made.backward()
assert {p.grad.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
assert net.conv.weight.grad.device.type == "paper"
os._exit(0)  # autograd's thread for a device of this kind now and then aborts a process that ends
"""


@pytest.mark.slow
def test_casts_are_cudas() -> None:
    done = subprocess.run([sys.executable, "-c", COMPARISON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lists_of_the_installed_header() -> None:
    half, single = ({str(op) for op in listed(p)} for p in ("LOWER_PRECISION_FP", "FP32"))
    assert {"aten.linear.default", "aten.conv2d.default", "aten.bmm.default"} <= half
    assert {"aten.layer_norm.default", "aten.pow.Tensor_Scalar", "aten.exp.default"} <= single
    assert {str(op) for op in listed("FP32_SET_OPT_DTYPE")} >= {"aten.softmax.int", "aten.sum.default"}
    assert not half & single
