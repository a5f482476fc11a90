"""`mixed_adapters` on whole models: own heads, norms and biases, windows, sequence-first models."""

import copy

import pytest
import torch
from mixed import SAMPLES, assert_unchanged, batch, each_alone, several, snapshot
from several import OTHERS, two
from small import Classifier, cnn, encoder, mlp, vit
from torch import nn

import lora_lightning as ll


@pytest.mark.parametrize("build", [mlp, cnn, vit, encoder])
@pytest.mark.parametrize("selected", [("one",), ("two",), ("three", "two")], ids="-".join)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_each_row_is_that_of_its_adapter_alone(build, selected, grad):
    model, x = several(build, selected), batch(build)
    before = snapshot(model)
    with torch.set_grad_enabled(grad):
        wanted = each_alone(model, x)
        plain = model(x)
        assert_unchanged(model, before)
        with ll.mixed_adapters(model, SAMPLES):
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
        assert_unchanged(model, before)
        for name in (None, "one", "two"):
            same = each_alone(model, x, [name] * 6)
            with ll.mixed_adapters(model, [name] * 6):
                torch.testing.assert_close(model(x), same, rtol=1e-4, atol=1e-5)
        assert_unchanged(model, before)
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("build", [mlp, cnn, vit, encoder])
def test_train_mode_is_exact_where_norms_do_not_move(build):
    model, x = several(build, train_norm="affine").train(), batch(build)
    wanted = each_alone(model, x)
    with ll.mixed_adapters(model, SAMPLES):
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_updates_of_the_selected_and_the_head_of_the_first():
    model = several(vit, ("two", "one"), train_norm="affine").double()
    x = batch(vit).double()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    with ll.mixed_adapters(model, SAMPLES):
        y = model(x)
    y.square().sum().backward()  # after the context: what was saved for it is still there
    got = {n: model.get_parameter(n).grad.clone() for n in names}
    model.zero_grad()
    for i, name in enumerate(SAMPLES):
        if name is None or name == "three":
            continue
        single = several(vit, (name,), train_norm="affine").double()
        single(x[i : i + 1]).square().sum().backward()
        for n, parameter in single.named_parameters():
            if parameter.grad is not None and n in got and (".lora." in n or name == "two"):
                got[n] -= parameter.grad
    assert all(difference.abs().max() < 1e-8 for difference in got.values())
    assert any(".lora.one." in n for n in got) and "head.weight" in got


def test_windows_have_a_multiple_of_the_rows():
    import timm

    def swin():
        return timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=28, window_size=7, embed_dim=12, depths=(2, 2),
            num_heads=(2, 2), num_classes=3, patch_size=2,
        )  # fmt: skip

    for train_bias in ("none", "all"):  # which has tables of its own, read beside the mask of shifted windows
        model, x = several(swin, train_bias=train_bias), torch.randn(6, 3, 28, 28)
        wanted = each_alone(model, x)
        with ll.mixed_adapters(model, SAMPLES):
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_queries_of_the_models_own_for_each_sample():
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.body = nn.Parameter(torch.randn(1, 4, 5)), nn.Linear(5, 3)

        def forward(self, x):
            return self.body(self.query.expand(len(x), -1, -1)) * x

    model, x = several(Latents, target_modules=["body"], modules_to_save=None), torch.randn(6, 1, 1)
    wanted = each_alone(model, x)
    with ll.mixed_adapters(model, SAMPLES):
        torch.testing.assert_close(model(x), wanted)


class SequenceFirst(nn.Module):
    """(time, batch, features) inside, as many speech models."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.lstm = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(self.layer(x))[0])


def test_sequence_first_models():
    model = several(SequenceFirst)
    for steps in (5, 12):  # 12 is a multiple of the samples: the first dimension is not taken for them
        x = torch.randn(steps, 6, 8)
        wanted = each_alone(model, x, dim=1)
        with ll.mixed_adapters(model, SAMPLES):
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    says = r"6 samples are twice .*sequences first in layer.self_attn"
    with pytest.raises(ll.UserError, match=says), ll.mixed_adapters(model, SAMPLES):
        model(torch.randn(6, 6, 8))


def test_a_lightning_module_and_a_forward_that_was_replaced():
    model = several(lambda: Classifier(vit()))
    head = model.model.head
    own = head.forward
    head.forward = lambda x: 2 * own(x)
    x = batch(vit)
    wanted = each_alone(model, x)
    with ll.mixed_adapters(model, SAMPLES):
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert "forward" in head.__dict__


def test_hooks_see_the_whole_batch():
    model, seen = several(vit), []
    model.head.register_forward_hook(lambda m, i, o: seen.append((i[0].shape[0], o.shape[0])))
    with ll.mixed_adapters(model, SAMPLES):
        model(batch(vit))
    assert seen == [(6, 6)]


PRODUCTS = ("aten::bmm", "aten::baddbmm", "aten::baddbmm_")


def test_the_number_of_products_does_not_grow_with_the_adapters():
    def products(samples) -> int:
        model = several(lambda: nn.Sequential(nn.Linear(8, 8), nn.Conv1d(4, 4, 1)), modules_to_save=None,
                        target_modules="all", train_bias="none", use_dora=False)  # fmt: skip
        for i in range(5):
            ll.add_adapter(
                model, f"more{i}", ll.LoRAConfig(rank=1, target_modules="all", modules_to_save=None)
            )
        with ll.mixed_adapters(model, samples), torch.no_grad():
            x = torch.randn(len(samples), 4, 8)
            model(x)
            with torch.profiler.profile() as profile:
                model(x)
        return sum(e.count for e in profile.key_averages() if e.key in PRODUCTS)

    few = products(["one", None, "one", "one", None, "one"])
    assert few == products(["one", "two", "three", *[f"more{i}" for i in range(3)]]) == 4


def test_adapters_in_the_batch_that_a_layer_does_not_have():
    model = several(mlp)
    ll.add_adapter(model, "part", ll.LoRAConfig(rank=2, target_modules=["3"]))
    x, samples = batch(mlp), ["part", "one", None, "part", "two", "part"]
    with torch.no_grad():
        for parameter in model[3].lora["part"].parameters():
            parameter.normal_()
    wanted = each_alone(model, x, samples)
    with ll.mixed_adapters(model, samples):
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert copy.deepcopy(model)(x).shape == (6, 3)


@torch.inference_mode()
def test_a_layer_that_is_the_head_of_an_adapter_that_is_not_in_the_batch():
    """Its weight and bias are the base's for all samples, and others stand in the model."""
    model = two(mlp, **OTHERS["all"])
    x, samples = torch.randn(4, 6), ["two", None, "two", None]
    with ll.mixed_adapters(model, samples):
        mixed = model(x)
    for i, name in enumerate(samples):
        with ll.mixed_adapters(model, [name]):
            torch.testing.assert_close(mixed[i], model(x[i : i + 1])[0], rtol=1e-5, atol=1e-5)


def test_autocast():
    model, x = several(vit), batch(vit)
    wanted = each_alone(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16), ll.mixed_adapters(model, SAMPLES):
        y = model(x)
    torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05 * float(wanted.detach().abs().max()))


def test_a_compiled_model_takes_new_rows_without_compiling_anew():
    model = several(vit).eval()
    x, graphs, counts = batch(vit), [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    for k in range(len(SAMPLES)):
        samples = [*SAMPLES[k:], *SAMPLES[:k]]
        with torch.no_grad(), ll.mixed_adapters(model, samples):
            assert torch.equal(compiled(x), model(x))
        counts.append(len(graphs))
    assert counts[0] == counts[-1] > 0
