"""W' of many layers at once: as of each alone; rounded once; what `Together` hands out is never stale."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lightning as ll
from lora_lightning.kernels import together
from lora_lightning.kernels.merge import Factored, merge
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.kernels.rounding import dithered_
from lora_lightning.layers.registry import lora_layers


def layers(n, dtype=torch.float32, wide=torch.float32, dora=False, shape=(24, 40), rank=3):
    return [
        Factored(
            torch.randn(shape, dtype=wide).to(dtype),
            torch.randn(rank, shape[1], dtype=wide),
            torch.randn(shape[0], rank, dtype=wide),
            torch.rand(shape[0], dtype=wide) if dora else None,
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("dora", [False, True])
def test_equals_the_sum(dora):
    given = layers(3, torch.float64, torch.float64, dora)
    for (W, A, B, m), found in zip(given, merge(given, 0.5, torch.float64), strict=True):
        sum_ = W + 0.5 * B @ A
        c = m / sum_.norm(dim=1) if dora else torch.ones(len(W)).double()
        torch.testing.assert_close(found.weight, c[:, None] * sum_)
        torch.testing.assert_close(found.up, 0.5 * c[:, None] * B)
        torch.testing.assert_close(found.low, 0.5 * A)
        assert found.extended.shape == (24, 48) and found.extended[:, 43:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("products", [torch.bfloat16, torch.float16])
def test_many_are_as_each_alone(dtype, products):
    given = layers(4, dtype)
    for one, found in zip(given, merge(given, 0.5, products), strict=True):
        (alone,) = merge([one], 0.5, products)
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True) if a is not None)
        assert found.weight.dtype == found.low.dtype == products
        assert (found.rank_factors is None) == (products != torch.float16)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_float32_weight_is_rounded_to_nearest_once(autocast):
    (given,) = layers(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (found,) = merge([given], 0.5, torch.bfloat16)
    assert torch.equal(found.weight, torch.addmm(given.weight, given.B, given.A, alpha=0.5).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_of_half_precision_is_dithered(dtype):
    given = [one._replace(B=1e-3 * one.B) for one in layers(2, dtype)]
    for one, found in zip(given, merge(given, 0.5, dtype), strict=True):
        sum_ = torch.addmm(one.weight.float(), one.B, one.A, alpha=0.5)
        assert torch.equal(found.weight, dithered_(sum_.clone(), dtype))
        assert not torch.equal(found.weight, sum_.to(dtype))


def test_a_quantized_weight_counts_as_what_it_stands_for():
    (given,) = layers(1)
    W = QuantizedTensor.of(given.weight, "int8")
    (found,) = merge([given._replace(weight=W)], 0.5, torch.bfloat16)
    assert torch.equal(found.weight, torch.addmm(W.dequantize(), given.B, given.A, alpha=0.5).bfloat16())


def stack(depth=5):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)], nn.Linear(8, 3))
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=[str(i) for i in range(depth)]))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora["default"].weight.lora_B)
    return model[:depth]


def exact(model, x):
    """What the model is to compute, from the parameters as they are now."""
    for layer in lora_layers(model).values():
        update = layer.lora["default"].weight
        x = nn.functional.linear(
            x, layer.base_weight("weight") + update.scaling * update.lora_B @ update.lora_A, layer.bias
        )
    return x


@pytest.fixture
def formed(monkeypatch):
    """How many weights each call of `merge` formed."""
    counts = []

    def counted(given, *rest):
        counts.append(len(given))
        return merge(given, *rest)

    monkeypatch.setattr(together, "merge", counted)
    return counts


@pytest.mark.usefixtures("off_cpu")
class TestTogether:
    def test_layers_of_one_shape_are_formed_by_one_call(self, formed):
        model = stack()
        x = torch.randn(16, 8)
        for _ in range(3):
            torch.testing.assert_close(model(x), exact(model, x))
            model(x).sum().backward()
        assert formed[:5] == [1] * 5 and set(formed[5:]) == {5}  # the first time they become known

    def test_no_more_at_a_time_than_memory_allows(self, formed, monkeypatch):
        monkeypatch.setattr(together, "MOST", 2 * 64)
        model = stack()
        for _ in range(2):
            model(torch.randn(16, 8))
        assert formed[5:] == [2, 2, 1]

    @pytest.mark.parametrize(
        "change",
        [
            lambda update: update.lora_A.mul_(3),
            lambda update: setattr(update.lora_B, "data", update.lora_B * 2),
            lambda update: setattr(update, "lora_A", nn.Parameter(update.lora_A * 2)),
            lambda update: setattr(update, "scaling", 7.0),
            lambda update: setattr(update, "dropout", 0.5),
        ],
    )
    @torch.no_grad()
    def test_a_change_between_forming_and_asking_is_seen(self, change):
        model = stack()
        x = torch.randn(16, 8)
        model(x)
        model[0](x)  # forms all; the last one waits
        update = lora_layers(model)["4"].lora["default"].weight
        change(update)
        model.eval()
        torch.testing.assert_close(model[4](x), exact(nn.Sequential(model[4]), x))

    def test_a_base_weight_that_changes_is_seen(self):
        model = stack()
        x = torch.randn(16, 8)
        model(x)
        model[0](x)
        with torch.no_grad():
            model[4].base_weight("weight").mul_(2)
        torch.testing.assert_close(model[4](x), exact(nn.Sequential(model[4]), x))

    def test_none_waits_longer_than_to_the_next_backward(self):
        model = stack()
        x = torch.randn(16, 8)
        model(x)
        model[0](x).sum().backward()
        update = lora_layers(model)["4"].lora["default"].weight
        update.lora_A.data.mul_(3)  # as an optimizer that nobody sees writing
        torch.testing.assert_close(model[4](x), exact(nn.Sequential(model[4]), x))

    def test_a_layer_used_twice_and_one_left_out(self):
        model = stack()
        x = torch.randn(16, 8)
        for order in ([0, 1, 1, 2], [0, 3, 4], [4, 3, 2, 1, 0, 0]):
            y, z = x, x
            for i in order:
                y, z = model[i](y), exact(nn.Sequential(model[i]), z)
            torch.testing.assert_close(y, z)

    def test_eval_by_inference_mode_does_not_reach_training(self):
        model = stack()
        x = torch.randn(16, 8)
        model(x)
        with torch.inference_mode():
            model[0](x)
        model[1:](x).sum().backward()

    def test_parameters_without_versions_are_never_taken_for_unchanged(self):
        with torch.inference_mode():
            model = stack()
            x = torch.randn(16, 8)
            for scale in (1, 2):
                lora_layers(model)["4"].lora["default"].weight.lora_B.mul_(scale)
                torch.testing.assert_close(model(x), exact(model, x))
                model[0](x)

    def test_copies_that_live_for_a_forward_leave_nothing_behind(self):
        model = stack()
        x = torch.randn(16, 8)
        together = model[0].lora_choice.together
        for _ in range(20):
            replica = copy.copy(model[0])
            torch.testing.assert_close(replica(x), exact(nn.Sequential(model[0]), x))
        assert sum(map(len, together._groups.values())) <= 2

    def test_a_checkpointed_layer_is_formed_alone(self, formed):
        model = stack()
        x = torch.randn(16, 8, requires_grad=True)
        model(x)
        formed.clear()
        y = x
        for layer in model:
            y = checkpoint(layer, y, use_reentrant=False)
        y.sum().backward()
        assert formed[0] == 5 and formed[1:] == [1] * 5
        z = torch.randn(16, 8).requires_grad_()
        z.data.copy_(x.detach())
        exact(model, z).sum().backward()
        torch.testing.assert_close(x.grad, z.grad)

    def test_the_last_reference_to_a_layer_is_not_held(self):
        import gc
        import weakref

        model = stack()
        model(torch.randn(16, 8))
        layer, choice = weakref.ref(model[3]), model[0].lora_choice
        del model
        gc.collect()
        assert layer() is None and choice is not None
