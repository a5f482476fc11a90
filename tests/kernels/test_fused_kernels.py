"""Triton's kernels against float64: on a GPU (-m gpu), and in its interpreter, in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_lightning as ll
from lora_lightning.kernels.functional import lora_linear
from lora_lightning.kernels.fused import operators, plain, trust
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from tests.kernels.fused_cases import (
    LAYOUTS,
    MOST,
    assert_merged,
    dropped_case,
    dropped_errors,
    gradients_case,
    gradients_errors,
    merge_case,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def kernel(test):
    """A test of a kernel, where one can run."""
    return test if INTERPRETED else pytest.mark.gpu(test)


def launch():
    from lora_lightning.kernels.fused import launch

    return launch


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which):
    command = [sys.executable, "-m", "pytest", __file__, "-m", f"{which} and not gpu"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@kernel
@pytest.mark.parametrize(
    ("sizes", "source", "dtype", "layout", "dropout"),
    [
        ((77, 140, 65, 5), "identity", torch.bfloat16, "apart", 0.3),
        ((33, 72, 24, 16), "layer_norm", torch.float16, "plain", 0.3),
        ((20, 140, 24, 20), "gelu", torch.bfloat16, "transposed", 0.0),
        ((1, 16, 1, 1), "gelu", torch.float32, "plain", 0.0),
        ((0, 16, 8, 4), "identity", torch.bfloat16, "plain", 0.0),
    ],
    ids=str,
)
def test_the_gradients_of_the_factors(sizes, source, dtype, layout, dropout):
    case = gradients_case(*sizes, source, dtype, layout, device=DEVICE, dropout=dropout)
    found = launch().factor_gradients(*case)
    assert max(gradients_errors(found, case)) <= MOST
    assert all(map(torch.equal, found, launch().factor_gradients(*case)))
    assert trust._gradients_error(found, case) <= 1


@kernel
@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300)),
    rank=st.sampled_from([1, 4, 8, 16, 24, 64, 100, 256]),
    source=st.sampled_from(sorted(plain.SOURCES)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    affine=st.tuples(st.booleans(), st.booleans()),
    dropout=st.sampled_from([0.0, 0.1]),
)
def test_the_gradients_of_the_factors_in_any_shape(sizes, rank, source, dtype, layout, affine, dropout):
    case = gradients_case(*sizes, rank, source, dtype, layout, affine, DEVICE, dropout)
    found = launch().factor_gradients(*case)
    assert max(gradients_errors(found, case)) <= MOST
    assert trust._gradients_error(found, case) <= 1


def dropouts_errors(case):
    x, G, A, *drops = case
    beside = len(x) % 2 == 1
    H, dX = launch().dropped_low_rank(x, A, *drops, beside), launch().dropped_sum(x, G, A, *drops)
    assert trust._low_rank_error(H, (x, A, *drops, beside)) <= 1
    assert trust._sum_error(dX, case) <= 1
    return dropped_errors(H, dX, case)


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropouts_products(dtype):
    assert max(dropouts_errors(dropped_case(37, 70, 5, dtype, "apart", DEVICE))) <= MOST


@kernel
@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 100), st.integers(1, 200)),
    rank=st.sampled_from([1, 8, 24, 64, 256]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_dropouts_products_in_any_shape(sizes, rank, dtype, layout):
    assert max(dropouts_errors(dropped_case(*sizes, rank, dtype, layout, DEVICE))) <= MOST


@kernel
@pytest.mark.parametrize(
    ("weight", "dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
    ids=str,
)
def test_the_merged_weight(weight, dtype):
    case = merge_case(33, 70, 5, weight, "apart", DEVICE)
    E = launch().merge(*case, dtype)
    assert_merged(E, case, dtype)
    # the same random bits as in torch's operations: but for sums in another order
    assert torch.count_nonzero(plain.merge(*case, dtype) != E) <= 2
    alone = launch().merge(*case, dtype, adds=False)
    assert torch.equal(alone[:, :70], case[0].to(dtype)) and torch.equal(alone[:, 70:], E[:, 70:])
    unchanged = launch().merge(case[0], case[1], case[2] * 0, 0.5, weight)
    assert torch.equal(unchanged[:, :70], case[0])
    assert trust._merged_error(E, (*case, dtype, True)) <= 1


@kernel
@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 300), st.sampled_from([1, 4, 8, 16, 24, 64, 256])),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    size=st.sampled_from([1e-7, 1e-3, 1e3]),
)
def test_the_merged_weight_in_any_shape(sizes, dtypes, layout, size):
    weight, dtype = dtypes
    case = merge_case(*sizes, weight, layout, DEVICE, size)
    E = launch().merge(*case, dtype)
    assert_merged(E, case, dtype)
    assert trust._merged_error(E, (*case, dtype, True)) <= 1


@kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16.0, 1e-5], ids=["normal", "subnormal"])
@pytest.mark.slow
def test_the_dither_is_that_of_torchs_operations(dtype, size):
    W = (torch.randn(64, 300, device=DEVICE) * size).to(dtype)
    A, B = torch.randn(1, 300, device=DEVICE), torch.randn(64, 1, device=DEVICE) * size * 1e-3
    W[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    found, own = launch().merge(W, A, B, 1.0, dtype), plain.merge(W, A, B, 1.0, dtype)
    same = (found == own) | (found.isnan() & own.isnan())
    assert (~same).sum() <= 3 and found[0, 0].isnan() and found[0, 1] == -found[0, 2] == float("inf")


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("sizes", [(24, 64, 5), (33, 70, 8)])
@pytest.mark.slow
def test_the_merged_weight_of_codes(kind, dtype, sizes):
    W, A, B, scaling = merge_case(*sizes, torch.float32, device=DEVICE)
    W = QuantizedTensor.of(W, kind)
    E = launch().merge_quantized(W.codes, W.scales, kind, A, B, scaling, dtype)
    assert_merged(E, (W.dequantize(torch.float32), A, B, scaling), dtype)
    assert trust._merged_error(E, (W.codes, W.scales, kind, A, B, scaling, dtype, True)) <= 1


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (77, 140), (300, 5)])
def test_the_gradient_of_magnitudes(sizes, dtype):
    T, D = sizes
    dY = torch.randn(T, D + 3, device=DEVICE).to(dtype)[:, :D]
    y = torch.randn(T, 2 * D, device=DEVICE).to(dtype)[:, D:]
    m = torch.rand(D, device=DEVICE) + 0.5
    m[0] = 0
    for bias in (None, torch.randn(D, device=DEVICE).to(dtype)):
        case = dY, y, bias, m
        dm = launch().magnitude_gradient(*case)
        assert dm.dtype == torch.float32 and dm[0] == 0 and trust._magnitude_error(dm, case) <= 1
        assert D == 1 or trust._magnitude_error(dm * 1.01, case) > 1
    assert launch().magnitude_gradient(dY[:0], y[:0], None, m).eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("source", "d_in", "d_out"), [("layer_norm", 768, 2304), ("gelu", 3072, 768)])
def test_the_sizes_of_a_vision_transformer(source, d_in, d_out, dtype):
    case = gradients_case(25216, d_in, d_out, 8, source, dtype, device="cuda")
    assert max(gradients_errors(operators.factor_gradients(*case), case)) <= MOST
    given = merge_case(d_out, d_in, 8, dtype, device="cuda")
    assert_merged(operators.merge(*given, dtype), given, dtype)
    names = {key[0] for key in trust._compared}
    assert {"merge", "factor_gradients"} <= names


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_on_a_gpu(dtype, autocast):
    if autocast and dtype == torch.float32:
        pytest.skip("no autocast to float32")
    own = torch.float32 if autocast else dtype
    norm = torch.nn.LayerNorm(256, device="cuda", dtype=own)
    x, W = (
        torch.randn(4, 65, 256, device="cuda", dtype=own),
        torch.randn(512, 256, device="cuda", dtype=own) / 16,
    )
    A, B = torch.randn(8, 256, device="cuda") / 16, torch.randn(512, 8, device="cuda") / 16
    found = []
    for implementation, kind in (("fused", own), ("reference", torch.float64)):
        tensors = [t.to(kind).requires_grad_() for t in (x, A, B)]
        if implementation == "fused":
            tensors[1:] = [t.detach().requires_grad_() for t in (A, B)]
        with torch.autocast("cuda", dtype, enabled=autocast and implementation == "fused"):
            y = lora_linear(
                norm.to(kind)(tensors[0]), W.to(kind), None, *tensors[1:], implementation=implementation
            )
        found.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for one, other in zip(*found):
        assert (one.double() - other).norm() <= max(4 * torch.finfo(dtype).eps, 1e-5) * other.norm()
    assert all(torch.isfinite(t).all() for t in found[0])


@pytest.mark.gpu
def test_a_model_trains_on_a_gpu():
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.LayerNorm(64), torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
    ).cuda()
    config = ll.LoRAConfig(rank=4, target_modules=["1", "3"], modules_to_save=None, implementation="fused")
    ll.inject(model, config)
    x = torch.randn(32, 17, 64, device="cuda", requires_grad=True)
    optimizer = torch.optim.Adam(ll.lora_parameters(model), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
