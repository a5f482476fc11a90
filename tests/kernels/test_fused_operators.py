"""The fused operators in torch's operations, as torch knows them, and what compares the kernels with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_lightning as ll
from lora_lightning.errors import UserError
from lora_lightning.kernels import rounding
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

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALF]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 20), st.integers(1, 18)),
    source=st.sampled_from(sorted(plain.SOURCES)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    affine=st.tuples(st.booleans(), st.booleans()),
    dropout=st.sampled_from([0.0, 0.3]),
)
def test_the_gradients_of_the_factors(sizes, source, dtype, layout, affine, dropout):
    case = gradients_case(*sizes, source, dtype, layout, affine, dropout=dropout)
    assert max(gradients_errors(operators.factor_gradients(*case), case)) <= MOST


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 40)),
    dtypes=st.tuples(st.sampled_from(DTYPES[1:]), st.sampled_from(DTYPES[1:])),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_the_merged_weight(sizes, dtypes, layout):
    weight, dtype = dtypes
    case = merge_case(*sizes, weight, layout)
    E = operators.merge(*case, dtype)
    assert_merged(E, case, dtype)
    alone = operators.merge(*case, dtype, False)
    assert torch.equal(alone[:, : sizes[1]], case[0].to(dtype)) and torch.equal(
        alone[:, sizes[1] :], E[:, sizes[1] :]
    )
    none = operators.merge(case[0], case[1], case[2] * 0, 0.5, weight)
    assert torch.equal(none[:, : sizes[1]], case[0])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_weight_of_codes(kind, dtype):
    _, A, B, scaling = merge_case(24, 64, 5, torch.float32)
    W = QuantizedTensor.of(torch.randn(24, 64) / 16, kind)
    E = operators.merge_quantized(W.codes, W.scales, kind, A, B, scaling, dtype)
    exact = W.dequantize(torch.float32).double() + scaling * B.double() @ A.double()
    torch.testing.assert_close(
        E[:, :64].double(), exact, rtol=max(torch.finfo(dtype).eps / 2, 1e-6), atol=1e-7
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1.0, 2e-6], ids=["normal", "subnormal"])
def test_the_dither_is_unbiased_and_keeps_what_needs_no_rounding(dtype, size):
    """A share of a unit is kept by as many entries as the share says, in both signs; a whole one by all."""
    for share in (0.0, 0.1, 0.5, 0.75, 1.0):
        for sign in (1, -1):
            low = torch.tensor(size * sign).to(dtype)
            up = torch.nextafter(low, torch.tensor(10.0 * sign).to(dtype))
            x = torch.lerp(low.float(), up.float(), share).expand(500, 400)
            found = rounding.dithered_(x.clone(), dtype)
            assert ((found == low) | (found == up)).all()
            deviation = (share * (1 - share) / x.numel()) ** 0.5
            assert (found == up).double().mean().item() == pytest.approx(share, abs=4 * deviation + 2.0**-13)


@pytest.mark.parametrize("dtype", HALF)
def test_the_dither_of_what_has_no_neighbours(dtype):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0]])
    assert torch.equal(rounding.dithered_(x.clone(), dtype).nan_to_num(3.0), x.to(dtype).nan_to_num(3.0))


def test_random_bits_of_neighbours_are_strangers():
    bits = rounding.mixed(torch.arange(2**16)).double() / 2**32
    assert abs(bits.mean() - 0.5) < 0.005 and abs(bits.var() - 1 / 12) < 0.002
    for apart in (1, 2, 64, 768):
        assert abs(torch.corrcoef(torch.stack([bits[:-apart], bits[apart:]]))[0, 1]) < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beside", [True, False])
def test_dropouts_products(dtype, layout, beside):
    case = x, G, A, *drops = dropped_case(9, 40, 5, dtype, layout)
    H, dX = operators.dropped_low_rank(x, A, *drops, beside), operators.dropped_sum(x, G, A, *drops)
    assert max(dropped_errors(H, dX, case)) <= 2


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.999])
def test_the_mask_keeps_as_many_as_it_says(dropout):
    """In every place; and neighbours, squares of them, and the masks of two seeds are strangers."""
    one, other = (plain.kept(700, 600, dropout, torch.tensor([seed])).double() for seed in (5, 6))
    assert torch.equal(plain.kept(5, 600, dropout, torch.tensor([5]), 9).double(), one[9:14])
    deviation = (dropout * (1 - dropout)) ** 0.5
    one, other = ((t - (1 - dropout)) / deviation for t in (one, other))
    near = [one[:-n, :-n] * one[n:, n:] for n in (1, 2, 64)]
    squares = [one[:-n, :-n] * one[n:, :-n] * one[:-n, n:] * one[n:, n:] for n in (1, 64)]
    pairs = [one * other, one[1:] * one[:-1], one[:, 1:] * one[:, :-1], *near]
    for part in [one, one[:, ::2], one[::2], *pairs, *(squares if 0.01 < dropout < 0.99 else ())]:
        assert abs(part.mean().item()) * part.numel() ** 0.5 < 5


def test_no_overflow_in_float16():
    """X·Aᵀ may pass float16's largest number where the gradient is small."""
    dY, u, *norm, A, G, scaling, dropout, seed = gradients_case(5, 32, 8, 3, "identity", torch.float16)
    case = dY * 1e-3, u.abs() * 1000, *norm, A.abs() * 100, G * 1e-3, scaling, dropout, seed
    assert (case[1].float() @ case[-5].t()).min() > 65504
    dA, dB = operators.factor_gradients(*case)
    assert dA.isfinite().all() and dB.isfinite().all()


def test_what_torch_asks_of_an_operator():
    quantized = QuantizedTensor.of(torch.randn(24, 40), "int8")
    W, A, B, scaling = merge_case(24, 40, 5, torch.bfloat16)
    codes = quantized.codes, quantized.scales, "int8", A, B, scaling, torch.bfloat16
    torch.library.opcheck(operators.merge, (W, A, B, scaling, torch.bfloat16))
    torch.library.opcheck(operators.merge_quantized, codes)
    case = gradients_case(7, 40, 24, 5, "layer_norm", torch.bfloat16, dropout=0.3)
    torch.library.opcheck(operators.factor_gradients, case)
    x, G, A, *drops = dropped_case(7, 40, 5, torch.bfloat16)
    torch.library.opcheck(operators.dropped_low_rank, (x, A, *drops, True))
    torch.library.opcheck(operators.dropped_sum, (x, G, A, *drops))
    torch.library.opcheck(operators.magnitude_gradient, (case[0], case[0], None, torch.ones(24)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_meta_device_sees_one_operator(dtype):
    case = gradients_case(7, 40, 24, 5, "layer_norm", dtype)
    on_meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in case]
    for one, other in zip(operators.factor_gradients(*on_meta), operators.factor_gradients(*case)):
        assert one.is_meta and one.shape == other.shape and one.dtype == other.dtype
        assert one.stride() == other.stride()


class Launched:
    """In the place of Triton's launchers: torch's operations, and what is done to their results."""

    def __init__(self, change):
        self.change, self.calls = change, 0

    def __getattr__(self, name):
        def run(*given):
            self.calls += 1
            return self.change(getattr(plain, name)(*given))

        return run


CALLS = {
    "merge": lambda dtype: (*merge_case(24, 40, 5, dtype), dtype),
    "factor_gradients": lambda dtype: gradients_case(9, 40, 24, 5, "layer_norm", dtype, dropout=0.3),
    "dropped_low_rank": lambda dtype: (lambda x, G, A, *drops: (x, A, *drops, True))(
        *dropped_case(9, 40, 5, dtype)
    ),
    "dropped_sum": lambda dtype: dropped_case(9, 40, 5, dtype),
}


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setattr(trust, "_compared", set())

    def use(change):
        made = Launched(change)
        monkeypatch.setattr(trust, "_launch", lambda: made)
        return made

    return use


def each(change):
    return lambda made: tuple(map(change, made)) if isinstance(made, tuple) else change(made)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_kernels_are_compared_on_their_first_call_alone(name, dtype, launched, monkeypatch):
    monkeypatch.setattr(trust, "TOKENS", 4)  # several pieces
    case = CALLS[name](dtype)
    launched(lambda made: made)
    getattr(trust, name)(*case)
    assert len(trust._compared) == 1
    launched(each(lambda t: t * 2))
    getattr(trust, name)(*case)  # compared already
    trust._compared.clear()
    with pytest.raises(
        UserError, match=rf"{name} \(.*\) on cpu is wrong on its first call.*implementation='auto'"
    ):
        getattr(trust, name)(*case)
    assert not trust._compared


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_a_single_wrong_number_is_seen(name, where, value, launched):
    def spoilt(tensor):
        tensor.view(-1)[0 if where == "first" else -1] += value
        return tensor

    launched(each(spoilt))
    with pytest.raises(UserError, match="wrong on its first call"):
        getattr(trust, name)(*CALLS[name](torch.float32))


def test_a_kernel_that_does_not_run_is_one_message(launched):
    def fails(made):
        raise RuntimeError("PTX assembly aborted\nmany lines")

    launched(fails)
    with pytest.raises(
        ll.errors.UserError,
        match=r"could not run merge .*: PTX assembly aborted\. Take implementation='auto'",
    ):
        trust.merge(*CALLS["merge"](torch.float32))
