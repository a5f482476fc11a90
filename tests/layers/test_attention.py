"""Attention: each projection's update exactly once, rows that are left alone, the fused path in eval."""

import pytest
import torch
from families import adapted, base_model, config, fill, run
from torch import nn

import lora_lightning as ll


def test_the_output_projections_update_is_applied_exactly_once():
    name = "Attention"
    model = base_model(name, torch.float64).eval()
    ll.inject(model, config(name, target_modules=["out_proj"]))
    fill(model)
    update = model.layer.out_proj.lora["default"]["weight"]
    delta = 2 * torch.einsum("or,ri->oi", update.lora_B, update.lora_A).detach()
    x = torch.randn(5, 2, 8).double()
    once, twice = (base_model(name, torch.float64).eval() for _ in range(2))
    with torch.no_grad():
        once.layer.out_proj.weight.add_(delta)
        twice.layer.out_proj.weight.add_(2 * delta)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                got = run(model, (x,))
            torch.testing.assert_close(got, run(once, (x,)), rtol=1e-10, atol=1e-10)
            assert not torch.allclose(got[0], run(twice, (x,))[0])
        ll.merge(model)
        torch.testing.assert_close(run(model, (x,)), run(once, (x,)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "module", "parameter"),
    [
        ("Attention-q-v", "layer", "in_proj_weight"),
        ("Attention-q-v-dora", "layer", "in_proj_weight"),
        ("fused-qkv", "layer.qkv", "weight"),
        ("fused-qkv-dora", "layer.qkv", "weight"),
    ],
)
def test_rows_that_are_no_target_stay_bit_for_bit(name, module, parameter, dtype, merged):
    base = getattr(base_model(name, dtype).get_submodule(module), parameter)
    model = adapted(name, dtype)
    if merged:
        ll.merge(model)
    weight = getattr(model.get_submodule(module), parameter)
    q, k, v = (weight[8 * i : 8 * i + 8] == base[8 * i : 8 * i + 8] for i in range(3))
    assert k.all() and not q.all() and not v.all()


def test_the_key_of_fused_attention_is_the_bases_in_the_forward():
    model, base = adapted("fused-qkv"), base_model("fused-qkv")
    x = torch.randn(2, 5, 8)
    q, k, v = zip(model.layer.qkv(x).chunk(3, dim=-1), base.layer.qkv(x).chunk(3, dim=-1), strict=True)
    assert torch.equal(*k) and not torch.equal(*q) and not torch.equal(*v)


@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_encoder_sees_the_updates(padded, monkeypatch):
    """nn.TransformerEncoder in eval mode without gradients calls one kernel for a whole layer, over
    nested tensors where there is padding."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    settings = ["in_proj.q", "in_proj.v", "out_proj", "linear1", "linear2"]
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=settings, modules_to_save=None))
    x, padding = torch.randn(3, 5, 8), None
    if padded:
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, 3:] = True
    calls, kernel = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or kernel(*args)
    )
    model.eval()
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        fill(model)
        fused = model(x, src_key_padding_mask=padding)
    assert len(calls) == 4
    plain = model(x, src_key_padding_mask=padding)  # with gradients it takes the modules one by one
    assert len(calls) == 4
    kept = torch.ones(3, 5, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(fused[kept], plain[kept], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fused[kept], before[kept], rtol=1e-2)


def names(model: nn.Module, targets: list[str], **options) -> dict[str, int]:
    settings = ll.LoRAConfig(rank=2, target_modules=targets, modules_to_save=None, **options)
    return {p.name: p.rank for p in ll.plan(model, settings).layers}


def test_names_of_the_projections():
    packed = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    separate = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})
    assert list(names(packed, ["attn"])) == ["attn.in_proj"]
    assert list(names(packed, ["attn*"])) == ["attn.in_proj", "attn.out_proj"]  # no part beside its whole
    assert list(names(packed, ["in_proj.k"])) == ["attn.in_proj.k"]
    assert names(packed, ["in_proj.?"], rank_pattern={"q": 4}) == {
        "attn.in_proj.q": 4, "attn.in_proj.k": 2, "attn.in_proj.v": 2,
    }  # fmt: skip
    assert list(names(separate, ["attn"])) == ["attn.q_proj", "attn.k_proj", "attn.v_proj"]


def test_only_what_is_three_equal_parts_has_them():
    model = nn.ModuleDict({"qkv": nn.Linear(8, 25), "in_proj": nn.Linear(8, 24), "fc": nn.Linear(8, 24)})
    assert list(names(model, ["in_proj.q"])) == ["in_proj.q"]
    for missing in ("qkv.q", "fc.q"):
        with pytest.raises(ll.ConfigError, match="matches no layer"):
            names(model, [missing])
