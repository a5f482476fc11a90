"""The counter of operators against programs that are counted by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import saved_bytes
from benchmarks.paper_cost import Cost, Device
from benchmarks.paper_rules import BLOCKS, CHUNK, foreach_launches
from benchmarks.paper_stand_ins import as_on_a_gpu

N, IN, OUT = 1000, 64, 96  # tokens, widths
SLOW = Device(bandwidth=1e9, half=1e12, tf32=2e10, single=1e10, instructions=1e10, launch=1e-6)


def made(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def counted(program: Callable[[], object]) -> Cost:
    with Cost(SLOW) as cost:
        program()
    return cost


def test_step_of_a_linear() -> None:
    layer = nn.Linear(IN, OUT, device="meta", dtype=torch.bfloat16)
    x, dY = made(N, IN, grad=True), made(N, OUT)
    cost = counted(lambda: layer(x).backward(dY))
    x_, y_, w_, b_ = N * IN, N * OUT, IN * OUT, OUT
    forward, by_x, by_weight, by_bias = x_ + w_ + b_ + y_, y_ + w_ + x_, y_ + x_ + w_, y_ + b_
    assert {name: of.calls for name, of in cost.by.items()} == {"addmm": 1, "mm": 2, "sum": 1}
    assert (cost.total.calls, cost.total.launches) == (4, 4)
    assert cost.total.bytes == 2 * (forward + by_x + by_weight + by_bias)
    assert cost.total.flops == 3 * 2 * N * IN * OUT
    assert not cost.copies


@pytest.mark.parametrize(
    ("dtype", "shape", "seconds"),
    [
        (torch.bfloat16, (1, 1), 1e-6),  # a launch
        (torch.bfloat16, (512, 512), 3 * 512 * 512 * 2 / 1e9),  # bytes
        (torch.float32, (512, 512), 2 * 512**3 / 1e10),  # operations
    ],
)
def test_time_is_the_longest_of_launch_bytes_and_operations(dtype, shape, seconds) -> None:
    a, b = made(*shape, dtype=dtype), made(*shape, dtype=dtype)
    assert counted(lambda: a @ b).total.seconds == pytest.approx(seconds)


def test_convolutions_of_float32_take_tf32() -> None:
    x, weight = made(8, 64, 32, 32, dtype=torch.float32), made(64, 64, 3, 3, dtype=torch.float32)
    cost = counted(lambda: F.conv2d(x, weight, padding=1))
    assert cost.total.seconds == pytest.approx(cost.total.flops / SLOW.tf32)


def test_views_and_allocations_cost_nothing() -> None:
    x = made(4, 6)
    cost = counted(
        lambda: x.view(6, 4).t()[1:].unsqueeze(0).expand(3, 3, 6).detach().split(1) and x.new_empty(3)
    )
    assert cost.total.calls == 0


def test_what_is_overwritten_is_not_read() -> None:
    x, y = made(N), made(N)
    assert counted(lambda: x.copy_(y)).total.bytes == 2 * (N + N)
    assert counted(lambda: x.zero_()).total.bytes == 2 * N
    assert counted(lambda: x.add_(y)).total.bytes == 2 * (N + N + N)
    assert counted(lambda: torch.add(x, x)).total.bytes == 2 * (N + N)
    assert counted(lambda: torch.add(x, y, out=made(N))).total.bytes == 2 * (N + N + N)
    assert counted(lambda: torch.zeros_like(x)).total.bytes == 2 * N


def test_an_expanded_tensor_is_read_once() -> None:
    row = made(IN).expand(N, IN)
    assert counted(row.contiguous).total.bytes == 2 * (IN + N * IN)


def strided(rows: int, columns: int) -> Tensor:
    """The left columns of a wider matrix."""
    return made(rows, columns + 16)[:, :columns]


@pytest.mark.parametrize(("dY", "copied"), [(made(N, IN), 0), (strided(N, IN), N * IN)])
def test_layer_norm_packs_a_strided_gradient(dY, copied) -> None:
    norm = nn.LayerNorm(IN, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    x = made(N, IN, grad=True)
    y = norm(x)
    cost = counted(lambda: y.backward(dY))
    assert cost.copies.total() == 2 * 2 * copied  # read and written
    assert (cost.total.calls, cost.total.launches) == (1, 1 + (copied > 0))


def test_attention_packs_a_strided_gradient() -> None:
    qkv = made(2, 9, 3, 4, 16, grad=True)  # (batch, tokens, 3, heads, width)
    for dY, packed in ((made(2, 9, 64), True), (made(2, 9, 80)[..., :64], False)):
        with as_on_a_gpu():
            y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
            cost = counted(lambda y=y, dY=dY: y.backward(dY))
        assert cost.by["_scaled_dot_product_flash_attention_backward"].calls == 1
        assert cost.copies.total() == (0 if packed else 2 * dY.nbytes)


@pytest.mark.parametrize(
    ("program", "copied"),
    [
        (lambda: strided(N, IN) @ made(IN, OUT), 0),  # cuBLAS takes any step between rows
        (lambda: made(N, IN, 2)[..., 0] @ made(IN, OUT), N * IN),
        (lambda: torch.addmm(made(OUT), made(N, IN), made(IN, OUT)), 0),
        (lambda: torch.addmm(made(N, OUT), made(N, IN), made(IN, OUT)), N * OUT),
        (lambda: torch.addmm(made(N, OUT), made(N, IN), made(IN, OUT), beta=0), 0),
        (lambda: made(N, OUT).addmm_(made(N, IN), made(IN, OUT)), 0),
        (lambda: torch.baddbmm(made(3, N, OUT), made(3, N, IN), made(3, IN, OUT)), 3 * N * OUT),
    ],
)
def test_copies_of_products(program, copied) -> None:
    assert counted(program).copies.total() == 2 * 2 * copied


def test_convolution_wants_one_format_and_adds_its_bias_apart() -> None:
    last = torch.channels_last
    x, weight, bias = made(2, 8, 10, 10), made(16, 8, 3, 3), made(16)
    for a, b, copied in (
        (x, weight, 0),
        (x.to(memory_format=last), weight, weight.nbytes),
        (x, weight.to(memory_format=last), x.nbytes),
        (x.to(memory_format=last), weight.to(memory_format=last), 0),
    ):
        cost = counted(lambda a=a, b=b: F.conv2d(a, b))
        assert (cost.copies.total(), cost.total.launches) == (2 * copied, 1 + (copied > 0))
    cost = counted(lambda: F.conv2d(x, weight, bias))
    assert cost.copies.total() == 2 * 2 * 2 * 16 * 8 * 8


@pytest.mark.parametrize(("need_x", "need_weight"), [(True, True), (True, False), (False, True)])
def test_convolution_backward_is_a_kernel_for_each_gradient(need_x: bool, need_weight: bool) -> None:
    x, weight = made(2, 8, 10, 10, grad=need_x), made(16, 8, 3, 3, grad=need_weight)
    y = F.conv2d(x, weight)
    cost = counted(lambda: y.backward(torch.empty_like(y)))
    assert (cost.total.calls, cost.total.launches) == (1, need_x + need_weight)
    each = x.nbytes + weight.nbytes + y.nbytes  # dY and one of them read, the other's gradient written
    assert cost.total.bytes == each * (need_x + need_weight)


@pytest.mark.parametrize(("train", "passes"), [(False, 2), (True, 3)])
def test_batch_norm_reads_twice_in_train_mode(train: bool, passes: int) -> None:
    norm = nn.BatchNorm2d(64, device="meta", dtype=torch.bfloat16).train(train).requires_grad_(False)
    x, dY = made(8, 64, 32, 32, grad=True), made(8, 64, 32, 32)
    forward = counted(lambda: norm(x)).by["native_batch_norm"]
    assert forward.bytes == pytest.approx(passes * x.nbytes, rel=0.01)
    assert forward.launches == 3
    y = norm(x)
    backward = counted(lambda: y.backward(dY)).by["native_batch_norm_backward"]
    assert backward.bytes == pytest.approx((5 if train else 2) * x.nbytes, rel=0.01)
    assert backward.launches == 1


def test_a_gather_reads_what_it_writes() -> None:
    table, rows = made(1000, 16), torch.empty(10, dtype=torch.long, device="meta")
    assert counted(lambda: F.embedding(rows, table)).total.bytes == rows.nbytes + 2 * 10 * 16 * 2


def test_softmax_backward_is_two_kernels_and_roll_one_a_dimension() -> None:
    x = made(8, 50, grad=True)
    y = x.softmax(1)
    cost = counted(lambda: y.backward(made(8, 50)))
    assert (cost.total.calls, cost.total.launches, cost.total.bytes) == (1, 2, (3 + 3) * x.nbytes)
    image = made(2, 8, 8, 4)
    cost = counted(lambda: image.roll((1, 1), (1, 2)))
    assert (cost.total.calls, cost.total.launches, cost.total.bytes) == (1, 2, 4 * image.nbytes)


def test_launches_of_lists() -> None:
    small, others = ([made(10) for _ in range(100)] for _ in range(2))
    assert foreach_launches(small, 1) == 1
    assert foreach_launches(small, 2) == 2  # 64 tensors and 36
    assert foreach_launches([made(CHUNK * BLOCKS)], 2) == 1
    assert foreach_launches([made(CHUNK * BLOCKS + 1)], 2) == 2
    added = counted(lambda: torch._foreach_add_(small, others)).total
    assert (added.calls, added.launches, added.bytes) == (1, 2, 3 * 100 * 10 * 2)
    assert counted(lambda: torch.cat(small)).total.launches == 1
    assert counted(lambda: torch.stack(small * 2)).total.launches == 2


def test_dropout_is_one_operator_each_way() -> None:
    x = made(N, IN, grad=True)
    with as_on_a_gpu():
        cost = counted(lambda: F.dropout(x, 0.1).backward(made(N, IN)))
        assert counted(lambda: F.dropout(x, 0.1, training=False)).total.calls == 0
    assert {name: of.calls for name, of in cost.by.items()} == {
        "native_dropout": 1, "native_dropout_backward": 1,
    }  # fmt: skip
    assert cost.total.bytes == N * IN * (2 + 2 + 1 + 2 + 1 + 2)  # the mask is of bytes


def test_lstm_is_one_operator_and_packs_made_weights() -> None:
    lstm = nn.LSTM(8, 16, 2, device="meta", dtype=torch.bfloat16, batch_first=True)
    x = made(3, 5, 8, grad=True)
    matrices = sum(p.numel() for p in lstm.parameters() if p.dim() == 2)
    with as_on_a_gpu():
        own = counted(lambda: lstm(x)[0]).by["_cudnn_rnn"]
        lstm._flat_weights = [w + 0 for w in lstm._flat_weights]
        cost = counted(lambda: lstm(x)[0].backward(made(3, 5, 16)))
    assert (own.calls, own.launches, own.flops) == (1, 2 * 5 + 1, 2 * 15 * matrices)  # x is turned
    assert cost.by["_cudnn_rnn"].launches == own.launches + len(lstm._flat_weights)
    assert cost.by["_cudnn_rnn_backward"].flops == 2 * own.flops


def test_saved_bytes_on_the_meta_device() -> None:
    net = nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN)).to("meta", torch.bfloat16)
    x = made(N, IN, grad=True)
    assert saved_bytes(net, lambda: net(x).sum()) == 2 * (N * IN + 2 * N * OUT)
    net.requires_grad_(False)
    assert saved_bytes(net, lambda: net(x).sum()) == 2 * N * OUT
