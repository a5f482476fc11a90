"""What the fused operators are taken to cost."""

import pytest
import torch

from benchmarks.paper_cost import Cost, Device
from benchmarks.paper_fused import COSTS, INSTRUCTIONS, SPACE, kernels

pytest.importorskip("triton")
T, IN, OUT, R = 25_216, 768, 2304, 8
FAST = Device(bandwidth=1e12, half=1e15, tf32=1e15, single=1e15, instructions=1e12, launch=1e-9)


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_merge_is_a_kernel_over_the_weight() -> None:
    from lora_lightning.kernels.fused import operators

    W, A, B = made(OUT, IN), made(R, IN, dtype=torch.float32), made(OUT, R, dtype=torch.float32)
    with Cost(FAST) as cost:
        E = operators.merge(W, A, B, 1.0, torch.bfloat16)
    assert (cost.total.calls, cost.total.launches) == (1, 1)
    assert cost.total.bytes == W.nbytes + A.nbytes + B.nbytes + E.nbytes
    assert cost.total.seconds == pytest.approx(INSTRUCTIONS["dithered"] * OUT * IN / FAST.instructions)


@pytest.mark.parametrize("source", ["identity", "gelu"])
def test_factor_gradients_are_two_passes_and_a_sum(source: str) -> None:
    from lora_lightning.kernels.fused import operators

    dY, u, G, A = made(T, OUT), made(T, IN), made(T, R), made(R, IN, dtype=torch.float32)
    with Cost(FAST) as cost:
        operators.factor_gradients(dY, u, None, None, None, None, source, A, G, 1.0)
    least = dY.nbytes + u.nbytes + G.nbytes
    assert (cost.total.calls, cost.total.launches) == (1, 3)
    assert least < cost.total.bytes < 1.3 * least  # parts and sums besides
    assert cost.total.flops == 2 * T * R * (2 * IN + OUT)
    first = max(u.nbytes / FAST.bandwidth, INSTRUCTIONS[source] * T * IN / FAST.instructions)
    assert cost.total.seconds > first + dY.nbytes / FAST.bandwidth


def test_dropouts_operators_read_and_write_once() -> None:
    from lora_lightning.kernels.fused import operators

    x, G, A = made(T, IN), made(T, R), made(R, IN, dtype=torch.float32)
    drops = 0.1, made(1, dtype=torch.int64)
    with Cost(FAST) as cost:
        H = operators.dropped_low_rank(x, A, *drops, True)
    assert (cost.total.launches, cost.total.bytes) == (1, x.nbytes + A.nbytes + H.nbytes)
    with Cost(FAST) as cost:
        operators.dropped_sum(x, G, A, *drops)
    assert (cost.total.launches, cost.total.bytes) == (1, 2 * x.nbytes + IN // 64 * G.nbytes + A.nbytes)


def test_every_operator_has_its_cost() -> None:
    from lora_lightning.kernels.fused import operators

    assert {f"{SPACE}{schema.partition('(')[0]}" for schema in operators._SCHEMAS} == set(COSTS)


def test_an_unknown_operator_is_no_free_one() -> None:
    with pytest.raises(KeyError, match="lora_lightning::new"):
        kernels("lora_lightning::new", (), None)
