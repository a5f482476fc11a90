"""`mixed_adapters` on whole models: own heads, norms and biases, windows, sequence-first models, refusals."""

import copy

import pytest
import torch
from several import OTHERS, two
from small import BATCHES, Classifier, cnn, encoder, mlp, vit
from torch import nn

import lora_lightning as ll

SAMPLES = ["one", None, "two", "three", "one", "two"]
CONFIGS = {
    "one": {"rank": 2},
    "two": {"rank": 3, "train_norm": "both", "train_bias": "all"},
    "three": {"rank": 1, "target_modules": "all", "modules_to_save": None, "use_dora": True},
}


@torch.no_grad()
def several(build, selected=("one",), **changed) -> nn.Module:
    """A model with the adapters of CONFIGS, in which everything that they train has been changed."""
    torch.manual_seed(0)
    model = build().eval()
    for i, (name, options) in enumerate(CONFIGS.items()):
        config = ll.LoRAConfig(**{**options, **changed})
        if i:
            ll.add_adapter(model, name, config)
            ll.set_adapter(model, name)
        else:
            ll.inject(model, config, adapter=name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        own = set(model.lora_state.adapters[name].extra_trainables)
        for n, buffer in model.named_buffers():
            if n in own and buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    ll.set_adapter(model, *selected)
    return model


def each_alone(model: nn.Module, x: torch.Tensor, samples=SAMPLES, dim: int = 0) -> torch.Tensor:
    selected = model.lora_state.active
    outputs = []
    for i, name in enumerate(samples):
        sample = x.narrow(dim, i, 1)
        if name is None:
            with ll.adapters_off(model):
                outputs.append(model(sample))
        else:
            ll.set_adapter(model, name)
            outputs.append(model(sample))
    ll.set_adapter(model, *selected)
    return torch.cat(outputs, dim)


def batch(build, n: int = len(SAMPLES)) -> torch.Tensor:
    return torch.randn(n, *BATCHES[build]().shape[1:])


def snapshot(model: nn.Module):
    state = {n: (t, t.clone(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    return state, {n: (type(m), {*m.__dict__}) for n, m in model.named_modules()}


def assert_unchanged(model: nn.Module, before) -> None:
    state, modules = before
    now = model.state_dict(keep_vars=True)
    assert all(now[n] is t and torch.equal(t, v) and t.requires_grad == r for n, (t, v, r) in state.items())
    assert {n: (type(m), {*m.__dict__}) for n, m in model.named_modules()} == modules
    assert torch.backends.mha.get_fastpath_enabled()


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


def test_a_table_of_the_models_own_is_refused():
    """Of timm's, with as many rows as a multiple of the samples."""
    from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr

    def build():
        return SwinTransformerV2Cr(
            img_size=24, patch_size=4, window_size=6, embed_dim=12, depths=(1,), num_heads=(2,), num_classes=3
        )

    x = torch.randn(6, 3, 24, 24)
    says = r"input of stages.0.blocks.0.attn.meta_mlp.fc1, \(1296, 2\), is a table or positions"
    model = several(build, train_bias="none")
    with pytest.raises(ll.UserError, match=says), ll.mixed_adapters(model, SAMPLES):
        model(x)
    model = several(build, train_bias="none", exclude_modules=["meta_mlp.fc1", "meta_mlp.fc2"])
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


def test_rotations_are_no_samples_however_many_there_are():
    """The attention of EVA is given a table with a row for each of 4 patches."""
    import timm

    for n, dynamic in ((6, False), (4, False), (4, True)):  # one of the model's own, and one made anew

        def build(dynamic=dynamic):
            options = {"depth": 1, "num_classes": 3, "img_size": 28, "dynamic_img_size": dynamic}
            return timm.create_model("eva02_tiny_patch14_224", **options)

        model = several(build, target_modules=["mlp.fc1", "mlp.fc2"], train_bias="all", use_dora=False)
        names, x = SAMPLES[:n], torch.randn(n, 3, 28, 28)
        wanted = each_alone(model, x, names)
        with ll.mixed_adapters(model, names):
            if n == 6:
                torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
                continue
            with pytest.raises(ll.UserError, match=r"\(4, 5, 192\) and \(4, 128\): it cannot be told"):
                model(x)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_a_weight_that_is_read_without_a_call_is_refused_by_name(name):
    import timm

    def build():
        options = {} if "eva" in name else {"embed_dim": 24, "num_heads": 2}
        return timm.create_model(name, depth=1, num_classes=3, img_size=28, **options)

    model, x = several(build, target_modules=["qkv"], train_bias="none"), torch.randn(6, 3, 28, 28)
    before, same = snapshot(model), each_alone(model, x, ["two"] * 6)
    says = r"blocks.0.attn.qkv is not called, its weight is read"
    with pytest.raises(ll.UserError, match=says), ll.mixed_adapters(model, SAMPLES):
        model(x)
    assert_unchanged(model, before)
    with ll.mixed_adapters(model, ["two"] * 6):
        torch.testing.assert_close(model(x), same, rtol=1e-4, atol=1e-5)


def test_an_own_value_that_is_read_without_a_call_is_refused_by_name():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return nn.functional.linear(self.body(x), self.head.weight)

    model = several(Reads, target_modules=["body"], modules_to_save=["head"])
    with pytest.raises(ll.UserError, match=r"head is not called"), ll.mixed_adapters(model, SAMPLES):
        model(torch.randn(6, 4))


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


@pytest.mark.parametrize(
    ("shape", "says"),
    [((4, 5, 6), "to hold the 6 samples"), ((12, 6, 6), "second could hold them"), ((0, 6), "to hold the 6")],
)
def test_a_batch_of_another_size_is_refused(shape, says):
    model = several(mlp)
    with pytest.raises(ll.UserError, match=says), ll.mixed_adapters(model, SAMPLES):
        model(torch.randn(shape))
    with ll.mixed_adapters(model, SAMPLES):
        assert model(torch.randn(12, 5, 6)).shape == (12, 5, 3)


def test_a_table_of_positions_is_refused():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.positions = nn.Embedding(20, 4), nn.Embedding(20, 4)

        def forward(self, i):
            return self.words(i) + self.positions(torch.arange(i.shape[1]))

    model = several(Positions, target_modules="all", modules_to_save=None, use_dora=False)
    for steps in (6, 5, 12):
        with (
            pytest.raises(ll.UserError, match=r"mixed_adapters: .*positions"),
            ll.mixed_adapters(model, SAMPLES),
        ):
            model(torch.randint(0, 20, (6, steps)))

    class Distances(Positions):
        def forward(self, i):
            at = torch.arange(i.shape[1])
            return self.words(i) + self.positions((at[None] - at[:, None]).clamp(-3, 5) + 3).mean(1)

    model = several(Distances, target_modules="all", modules_to_save=None, use_dora=False)
    for steps in (6, 12):
        with (
            pytest.raises(ll.UserError, match=r"the input of positions, .*positions that all samples share"),
            ll.mixed_adapters(model, SAMPLES),
        ):
            model(torch.randint(0, 20, (6, steps)))
    words = several(Positions, target_modules=["words"], modules_to_save=None, use_dora=False)
    i = torch.randint(0, 20, (6, 5))
    wanted = each_alone(words, i)
    with ll.mixed_adapters(words, SAMPLES):
        torch.testing.assert_close(words(i), wanted)


def test_statistics_that_move_are_refused_in_train_mode():
    model = several(cnn, ("two",)).train()
    says = r"1 moves its running statistics.*model.eval"
    with pytest.raises(ll.UserError, match=says), ll.mixed_adapters(model, SAMPLES):
        model(batch(cnn))


def test_what_is_asked_wrongly_is_refused_before_anything_changes():
    model = several(mlp)
    before = snapshot(model)
    for samples, says in [
        ([], "one adapter's name, or None, a sample"),
        ("one", "give a list"),
        (["one", "onne"], "no adapter 'onne'. Did you mean 'one'"),
    ]:
        with pytest.raises(ll.UserError, match=says), ll.mixed_adapters(model, samples):
            pass
    for act in (lambda: ll.set_adapter(model, "two"), lambda: ll.delete_adapter(model, "two")):
        with pytest.raises(ll.UserError, match="leave that context first"), ll.mixed_adapters(model, SAMPLES):
            act()
    assert_unchanged(model, before)
    ll.merge(model)
    with pytest.raises(ll.UserError, match=r"unmerge\(model\) first"), ll.mixed_adapters(model, SAMPLES):
        pass


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
