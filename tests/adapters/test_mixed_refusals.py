"""What `mixed_adapters` refuses: rows that are no samples, weights read without a call, wrong names."""

import pytest
import torch
from mixed import SAMPLES, assert_unchanged, batch, each_alone, several, snapshot
from small import cnn, mlp
from torch import nn

import lora_lightning as ll


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
