"""Batches of adapters whose numbers lie in rows: each sample is answered as by its adapter alone."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from families import CASES, config, floats
from mixed import batch, each_alone
from mixed import several as several_of
from several import train
from small import cnn, encoder, mlp, pretrained, vit
from test_mixed_samples import ADAPTERS, BATCHED, SAMPLES, output_dims, several, whole_batch
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.adapters.bank import Bank
from lora_lightning.adapters.parking import Parked, park, put_back, take_out


def parked(model: nn.Module, options: ll.LoRAConfig) -> dict[str | None, Parked | None]:
    """All adapters of the model, taken out of it; the one that is left changes nothing."""
    names = ll.adapter_names(model)
    ll.add_adapter(model, "nothing", options)
    ll.set_adapter(model, "nothing")
    return {None: None, **{name: park(model, name) for name in names}}


@contextmanager
def mixed(bank: Bank, adapters: Sequence[Parked | None]) -> Iterator[bool]:
    """Gives whether adapters had to be in the model."""
    road, distinct = bank.road(adapters), {a for a in adapters if a is not None}
    in_model = distinct if road.splits or len({*adapters}) == 1 else set()
    for adapter in in_model:
        put_back(bank.model, adapter)
    with road.opened(adapters), torch.inference_mode():
        yield bool(in_model)
    for adapter in in_model:
        take_out(bank.model, adapter)


PLAIN = ["two", "one", None, "one", "two", "two"]
BATCHES = [SAMPLES, PLAIN, PLAIN[::-1], [None, *["one"] * 5], ["two"] * 6, SAMPLES]  # in one model


@pytest.mark.parametrize("name", BATCHED)
def test_every_family(name: str) -> None:
    model, inputs, dim = several(name), whole_batch(name), CASES[name].batch
    wanted = {
        (adapter, i): alone(model, adapter, i, inputs, dim)
        for adapter in (*ADAPTERS, None)
        for i in range(len(SAMPLES))
    }
    adapters = parked(model, config(name))
    bank = Bank(model)
    for names in BATCHES:
        with mixed(bank, [adapters[n] for n in names]):
            found = list(floats(model(*inputs)))
        for i, adapter in enumerate(names):
            dims = output_dims(name, found)
            for y, single, d in zip(found, wanted[adapter, i], dims, strict=True):
                torch.testing.assert_close(y.narrow(d, i, 1), single, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def alone(
    model: nn.Module, adapter: str | None, i: int, inputs: tuple[Tensor, ...], dim: int
) -> list[Tensor]:
    sample = tuple(x.narrow(dim, i, 1) for x in inputs)
    if adapter is None:
        with ll.adapters_off(model):
            return list(floats(model(*sample)))
    ll.set_adapter(model, adapter)
    return list(floats(model(*sample)))


@pytest.mark.parametrize("build", [mlp, cnn, vit, encoder])
def test_own_heads_norms_and_biases_and_other_ranks(build) -> None:
    model, x = several_of(build), batch(build)
    with torch.no_grad():
        wanted = {name: each_alone(model, x, [name] * 6) for name in (*ADAPTERS, None)}
    adapters = parked(model, ll.LoRAConfig(rank=1, modules_to_save=None))
    bank = Bank(model)
    for names in BATCHES:
        with mixed(bank, [adapters[n] for n in names]):
            found = model(x)
        expected = torch.stack([wanted[name][i] for i, name in enumerate(names)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def attention(batch_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
    return nn.Sequential(layer, nn.LayerNorm(8), nn.Linear(8, 3))


@pytest.mark.parametrize("build", [mlp, cnn, vit, attention])
def test_what_is_in_rows_is_read_nowhere_else(build, monkeypatch) -> None:
    """Plain adapters of several ranks, with heads: no update is looked at, no module is called by adapter."""
    model = build().eval()
    heads = {"modules_to_save": [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1:]}
    ll.inject(model, ll.LoRAConfig(rank=2, **heads), adapter="one")
    ll.add_adapter(model, "two", ll.LoRAConfig(rank=3, **heads))
    for name in ("one", "two"):
        ll.set_adapter(model, name)
        train(model, len(name))
    x = torch.randn(4, 6, 8) if build is attention else batch(build)
    names, dim = ["one", "two", None, "two", "one", "one"], int(build is attention)
    with torch.no_grad():
        wanted = each_alone(model, x, names, dim)
    adapters = parked(model, ll.LoRAConfig(rank=1, **heads))

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("an adapter was asked by itself")

    monkeypatch.setattr("lora_lightning.adapters.mixed_branch.stacked", refused)
    monkeypatch.setattr("lora_lightning.adapters.bank.split_call", refused)
    with mixed(Bank(model), [adapters[n] for n in names]) as in_model:
        assert not in_model
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_attention_with_masks_weights_and_other_keys() -> None:
    class Attends(nn.Module):
        def __init__(self, **options) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, **options)

        def forward(self, query, key, value, **options):
            return self.attention(query, key, value, **options)

    x, y = torch.randn(6, 4, 8), torch.randn(6, 5, 8)
    hidden = torch.arange(5) >= torch.tensor([5, 4, 3, 2, 1, 5])[:, None]  # (6, 5)
    names = ["one", "two", None, "two", "one", "one"]
    for batch_first, targets, given in (
        (True, ["attention"], {}),
        (True, ["attention", "attention.out_proj"], {"need_weights": False}),
        (True, ["attention.in_proj.q", "attention.in_proj.v"], {"key_padding_mask": hidden}),
        (False, "all", {"key_padding_mask": hidden, "need_weights": False}),
        (False, "all", {"key_padding_mask": hidden, "average_attn_weights": False}),
        (True, "all", {"attn_mask": torch.randn(4, 5), "key_padding_mask": hidden, "need_weights": False}),
        (True, ["attention.out_proj"], {"attn_mask": torch.randn(12, 4, 5)}),
    ):
        torch.manual_seed(0)
        model = Attends(batch_first=batch_first).eval()
        ll.inject(model, ll.LoRAConfig(rank=2, target_modules=targets), adapter="one")
        ll.add_adapter(model, "two", ll.LoRAConfig(rank=1, target_modules="all"))
        with torch.no_grad():
            for parameter in ll.lora_parameters(model):
                parameter.normal_()
            ll.set_adapter(model, "two")
            for parameter in ll.lora_parameters(model):
                parameter.normal_()
        query, key = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
        wanted = []
        for i, name in enumerate(names):
            one = {n: m[i : i + 1] if n == "key_padding_mask" else m for n, m in given.items()}
            if "attn_mask" in one and one["attn_mask"].dim() == 3:
                one["attn_mask"] = one["attn_mask"].view(6, 2, 4, 5)[i]
            dim = 0 if batch_first else 1
            sample = [t.narrow(dim, i, 1) for t in (query, key, key)]
            ll.set_adapter(model, name or "one")
            with torch.no_grad(), ll.adapters_off(model) if name is None else nullcontext():
                wanted.append(model(*sample, **one))
        adapters = parked(model, ll.LoRAConfig(rank=1, target_modules="all"))
        with mixed(Bank(model), [adapters[n] for n in names]) as in_model:
            found, weights = model(query, key, key, **given)
        assert not in_model
        expected = torch.cat([w[0] for w in wanted], 0 if batch_first else 1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        if given.get("need_weights", True):
            torch.testing.assert_close(weights, torch.cat([w[1] for w in wanted]), rtol=1e-5, atol=1e-5)
        else:
            assert weights is None


def test_a_part_with_dora_beside_a_whole_update() -> None:
    """The branch of one may not be written into the product that the other scales."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 6, bias=False)

        def forward(self, x):
            return self.qkv(x)

    model = Fused().eval()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["qkv"]), adapter="one")
    ll.add_adapter(model, "two", ll.LoRAConfig(rank=1, target_modules=["qkv.q"], use_dora=True))
    for name in ("one", "two"):
        ll.set_adapter(model, name)
        train(model, len(name))
    x, names = torch.randn(3, 4), ["one", "two", None]
    with torch.no_grad():
        wanted = each_alone(model, x, names)
        with ll.mixed_adapters(model, names):
            torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_layers_of_another_dtype_than_the_rows() -> None:
    class Widens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = (
                nn.Linear(4, 6),
                nn.Linear(6, 5).double(),
                nn.Linear(5, 2).double(),
            )

        def forward(self, x):
            return self.head(self.second(self.first(x).double()))

    model = Widens().eval()
    options = {"target_modules": ["first", "second"], "modules_to_save": ["head"]}
    ll.inject(model, ll.LoRAConfig(rank=2, alpha=3, **options), adapter="one")
    ll.add_adapter(model, "two", ll.LoRAConfig(rank=1, alpha=5, **options))
    for name in ("one", "two"):
        ll.set_adapter(model, name)
        train(model, len(name))
    x, names = torch.randn(4, 4), ["one", "two", None, "one"]
    with torch.no_grad():
        wanted = each_alone(model, x, names)
    adapters = parked(model, ll.LoRAConfig(rank=1, **options))
    with mixed(Bank(model), [adapters[n] for n in names]):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_row_holds_the_numbers_and_nothing_more() -> None:
    model = several_of(vit)
    adapters = parked(model, ll.LoRAConfig(rank=1, modules_to_save=None))
    for adapter in (a for a in adapters.values() if a is not None):
        begin, end = adapter.row.data_ptr(), adapter.row.data_ptr() + 4 * len(adapter.row)
        own = [p for slots in adapter.updates.values() for u in slots.values() for p in u.parameters()]
        assert all(begin <= t.data_ptr() < end for t in (*own, *adapter.record.values.values()))
        assert adapter.bytes() <= 4 * len(adapter.row) < 1.1 * adapter.bytes() + 64 * len(own)


def test_an_adapter_is_not_held_when_its_batch_is_over() -> None:
    model = several_of(mlp)
    adapters = parked(model, ll.LoRAConfig(rank=1, modules_to_save=None))
    bank, x = Bank(model), batch(mlp)
    for names in (SAMPLES, PLAIN):  # with DoRA, whose updates are asked one by one, and without
        with mixed(bank, [adapters[n] for n in names]):
            model(x)
    held = weakref.ref(adapters["two"])
    del adapters
    gc.collect()
    assert held() is None


def test_one_layer_in_two_precisions() -> None:
    """Products in float16 have their factors shared out, which those in float32 have not."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            for half in (True, False, True):
                with torch.autocast("cpu", torch.float16, enabled=half):
                    x = self.layer(x.float())
            return x

    model = Twice().eval()
    ll.inject(model, ll.LoRAConfig(rank=2), adapter="one")
    ll.add_adapter(model, "two", ll.LoRAConfig(rank=1))
    for name in ("one", "two"):
        ll.set_adapter(model, name)
        train(model, len(name))
    x, names = torch.randn(3, 4), ["one", "two", None]
    with torch.no_grad():
        wanted = each_alone(model, x, names)
    adapters = parked(model, ll.LoRAConfig(rank=1))
    with mixed(Bank(model), [adapters[n] for n in names]):
        torch.testing.assert_close(model(x), wanted, rtol=2e-3, atol=2e-3)


class Biased(nn.Module):
    """timm's attention, which in eval mode keeps what it has computed of its biases."""

    def __init__(self) -> None:
        from timm.models.levit import Attention

        super().__init__()
        self.attention, self.head = Attention(8, 4, 2, resolution=(2, 2)), nn.Linear(8, 3)
        nn.init.ones_(self.attention.proj.ln.bn.weight)  # it begins at 0: without attention

    def forward(self, x):
        return self.head(self.attention(x).mean(1))


def test_biases_that_attention_keeps(tmp_path) -> None:
    options = ll.LoRAConfig(rank=1, train_bias="all", target_modules=["attention.qkv.linear"])
    x, names, wanted = torch.randn(4, 4, 8), ["one", "two", None, "one"], {}
    for seed, name in enumerate(["one", "two"]):  # each by itself, in a model that has kept nothing yet
        model = pretrained(Biased)
        wanted.setdefault(None, model.eval()(x).detach())
        ll.inject(model, options, adapter=name)
        train(model, seed)
        assert "attention.attention_biases" in model.lora_state.adapters[name].extra_trainables
        ll.save_adapter(model, tmp_path / name)
        wanted[name] = model.train().eval()(x).detach()

    model = pretrained(Biased).eval()
    model(x)
    ll.load_adapter(model, tmp_path / "one", adapter="one")
    torch.testing.assert_close(model.eval()(x), wanted["one"])
    ll.load_adapter(model, tmp_path / "two", adapter="two")
    for name in ("two", "one"):
        ll.set_adapter(model, name)
        torch.testing.assert_close(model(x), wanted[name])
        with ll.adapters_off(model):
            torch.testing.assert_close(model(x), wanted[None])
    expected = torch.stack([wanted[name][i] for i, name in enumerate(names)])
    with ll.mixed_adapters(model, names):
        torch.testing.assert_close(model(x), expected)
    adapters = parked(model, options)
    bank = Bank(model)
    for turned in (names, [*names[1:], "one"]):
        with mixed(bank, [adapters[n] for n in turned]):
            expected = torch.stack([wanted[name][i] for i, name in enumerate(turned)])
            torch.testing.assert_close(model(x), expected)


def test_boxes_are_not_dealt_out_to_samples() -> None:
    """Of 7 and 1 boxes, 4 would be each sample's; a backbone alone differs from picture to picture."""
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as detector

    def several_on(targets: list[str]) -> tuple[nn.Module, ll.LoRAConfig]:
        torch.manual_seed(0)
        model = detector(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64).eval()
        options = ll.LoRAConfig(rank=2, target_modules=targets, modules_to_save=None)
        for name in ("one", "two"):
            ll.inject(model, options) if name == "one" else ll.add_adapter(model, name, options)
        return model, options

    pictures = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    model, options = several_on(["roi_heads.box_head.fc6"])
    first = ll.adapter_names(model)[0]
    told = r"mixed_adapters: the rows of roi_heads\.box_head\.fc6 are the boxes of all pictures"
    with pytest.raises(ll.UserError, match=told), ll.mixed_adapters(model, [first, "two"]):
        model(pictures)
    with ll.mixed_adapters(model, ["two", "two"]):
        model(pictures)
    adapters = parked(model, options)
    with pytest.raises(ll.UserError, match=told), mixed(Bank(model), [adapters[first], adapters["two"]]):
        model(pictures)
    model, options = several_on(["backbone.fpn.inner_blocks.0.0"])
    with ll.mixed_adapters(model, [first, "two"]):
        model(pictures)
