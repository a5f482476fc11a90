"""Cases of the fused operators, in float64 beside what is given, and their errors."""

import torch

from lora_lightning.kernels import rounding
from lora_lightning.kernels.fused import plain

UNITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20, torch.float64: 2.0**-45}


def least(dtype):
    """The size below which the dtype's numbers are no closer to each other."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / UNITS[dtype]


def rows_apart(tensor):
    """The same numbers as columns of a wider matrix, with NaN around them."""
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 24), float("nan"))
    wide[:, 8 : 8 + tensor.shape[1]] = tensor
    return wide[:, 8 : 8 + tensor.shape[1]]


MOST = 3.01  # units of the dtype: X, A and H are rounded, each by a unit at worst
LAYOUTS = {"plain": lambda t: t, "apart": rows_apart, "transposed": lambda t: t.t().contiguous().t()}


def gradients_case(
    T, d_in, d_out, rank, source, dtype, layout="plain", affine=(True, True), device="cpu", dropout=0.0
):
    """What `factor_gradients` is given; a norm with or without weight and bias."""
    torch.manual_seed(0)  # a case is a function of its arguments
    normal = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    u, dY, G = (LAYOUTS[layout](normal(T, n).to(dtype)) for n in (d_in, d_out, rank))
    A = normal(rank, d_in) / d_in**0.5
    mean = rstd = weight = bias = None
    wide = torch.promote_types(dtype, torch.float32)
    if "norm" in source:
        rstd = (u.to(wide).var(1, correction=0) + 1e-6).rsqrt()
        weight = 1 + 0.2 * normal(d_in).to(wide) if affine[0] else None
    if source == "layer_norm":
        mean, bias = u.to(wide).mean(1), 0.1 * normal(d_in).to(wide) if affine[1] else None
    seed = torch.randint(2**31, (1,), device=device) if dropout else None
    return dY, u, mean, rstd, weight, bias, source, A.to(wide), G, 0.7, dropout, seed


def gradients_errors(got, given):
    """The largest errors of dA and of dB, in units of the dtype, relative to the sizes of their terms."""
    *tensors, dropout, seed = given
    dY, *inputs, source, A, G, scaling = (t.double() if isinstance(t, torch.Tensor) else t for t in tensors)
    X, (u, mean, rstd) = plain.SOURCES[source](*inputs), inputs[:3]
    terms = (
        u.abs() if mean is None else 2 * (u.abs() + mean.abs()[:, None]) * rstd[:, None]
    )  # which may cancel
    size_of_X = least(given[0].dtype) + X.abs() + 2.0**-22 / UNITS[given[0].dtype] * terms
    if seed is not None:
        X, size_of_X = (plain.dropped(t, dropout, seed) for t in (X, size_of_X))
    found = []
    for own, left, right, size in (
        (got[0], G.t(), X, size_of_X),
        (got[1], scaling * dY.t(), X @ A.t(), size_of_X @ (A.abs() + least(given[0].dtype)).t()),
    ):
        assert own.shape == (left.shape[0], right.shape[1])
        assert own.dtype == torch.promote_types(given[0].dtype, torch.float32)
        size = (left.abs() @ size).clamp_min(1e-30)
        off = ((own.double() - left @ right).abs() / size).max().item() if size.numel() else 0.0
        found.append(off / UNITS[given[0].dtype])
    return found


def merge_case(d_out, d_in, rank, weight, layout="plain", device="cpu", size=1e-3):
    """W, A, B and s; the update is about `size` of an entry of W."""
    torch.manual_seed(0)  # a case is a function of its arguments
    W = LAYOUTS[layout]((torch.randn(d_out, d_in, device=device) / 16).to(weight))
    A, B = torch.randn(rank, d_in, device=device), torch.randn(d_out, rank, device=device) * size / 16
    return W, LAYOUTS[layout](A), LAYOUTS[layout](B), 0.5


def assert_merged(E, given, dtype):
    """W + s·B·A is a neighbour of the exact sum, s·B is rounded to nearest, the rest is zero."""
    W, A, B, scaling = given
    d_in, rank = W.shape[1], A.shape[0]
    assert E.dtype == dtype and E.shape == (W.shape[0], d_in + -(-rank // 16) * 16)
    exact = W.double() + scaling * B.double() @ A.double()
    terms = W.double().abs() + scaling * B.double().abs() @ A.double().abs()
    info = torch.finfo(dtype)
    unit = (info.eps * 2.0 ** exact.abs().clamp_min(1e-300).log2().floor()).clamp_min(
        info.smallest_normal * info.eps
    )
    share = 1 if rounding.dithers(W.dtype, dtype) else 0.5
    summed = (rank + 6) * 2.0**-24 * terms  # a rounding for each term of the sum, in float32
    assert ((E[:, :d_in].double() - exact).abs() <= share * unit + summed).all()
    assert torch.equal(E[:, d_in : d_in + rank], (B * scaling).to(dtype))
    assert not E[:, d_in + rank :].any()


def dropped_case(T, d_in, rank, dtype, layout="plain", device="cpu"):
    """What `dropped_low_rank` and `dropped_sum` are given."""
    torch.manual_seed(0)  # a case is a function of its arguments
    x, G = (LAYOUTS[layout](torch.randn(T, n, device=device).to(dtype)) for n in (d_in, rank))
    A = torch.randn(rank, d_in, device=device) / d_in**0.5
    return x, G, A, 0.3, torch.randint(2**31, (1,), device=device)


def dropped_errors(H, dX, given):
    """The largest errors of the two, in units of the dtype, relative to the sizes of their terms."""
    x, G, A, dropout, seed = (
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given
    )
    assert H.dtype == dX.dtype == given[0].dtype and dX.shape == x.shape
    if H.shape[1] > -(-len(A) // 16) * 16:  # behind x itself
        assert torch.equal(H[:, : x.shape[1]], given[0])
        H = H[:, x.shape[1] :]
    assert H.shape == (len(x), -(-len(A) // 16) * 16) and not H[:, len(A) :].any()
    X, smallest = plain.dropped(x, dropout, seed), least(given[0].dtype)
    change, size = (plain.dropped(t, dropout, seed) for t in (G @ A, G.abs() @ A.abs()))
    low = (H[:, : len(A)].double() - X @ A.t()).abs() / (
        (X.abs() + smallest) @ (A.abs() + smallest).t() + smallest
    )
    sum_ = (dX.double() - x - change).abs() / (x.abs() + size).clamp_min(1e-30)
    return [t.max().item() / UNITS[given[0].dtype] for t in (low, sum_)]
