"""Every family on a GPU, and by a GPU's forms on a CPU: the values and gradients of a CPU's reference."""

import copy

import pytest
import torch
from families import CASES, adapted, run, typical_cases

import lora_lightning as ll
from lora_lightning.kernels import common


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request, monkeypatch):
    """A GPU, or a CPU that takes a GPU's forms."""
    monkeypatch.setattr(common, "on_cpu", lambda device: False)
    return request.param


def step(model, inputs):
    """The outputs and the trained parameters' gradients, on the CPU, of a second step."""
    for _ in range(2):  # from the second on, weights of one shape are formed together
        model.zero_grad()
        outputs = run(model, inputs)
        sum(y.double().square().sum() for y in outputs).backward()
    return [t.detach().double().cpu() for t in (*outputs, *(p.grad for p in ll.lora_parameters(model)))]


@typical_cases
@pytest.mark.parametrize("implementation", ["auto", "fused"])
def test_a_step_in_float64(name, implementation, device):
    reference = adapted(name, torch.float64, implementation="reference").eval()
    model = adapted(name, torch.float64, implementation=implementation).eval()
    model.load_state_dict(copy.deepcopy(reference.state_dict()))
    inputs = CASES[name].inputs(torch.float64)
    wanted = step(reference, inputs)
    found = step(model.to(device), tuple(x.to(device) for x in inputs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@typical_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_under_autocast(name, dtype, device):
    if device == "cpu" and dtype == torch.float16 and "LSTM" in name:
        pytest.skip("CPUs have no LSTM in float16")
    reference = adapted(name, torch.float64, implementation="reference").eval()
    model = adapted(name, torch.float64).eval()
    model.load_state_dict(copy.deepcopy(reference.state_dict()))
    inputs = CASES[name].inputs(torch.float64)
    wanted = step(reference, inputs)
    inputs = tuple((x.float() if x.is_floating_point() else x).to(device) for x in inputs)
    with torch.autocast(device, dtype):
        found = step(model.float().to(device), inputs)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm() + 1e-6
