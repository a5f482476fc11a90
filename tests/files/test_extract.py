"""extract_lora: what fine-tuning has changed made an adapter, against numpy's decomposition of the change."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from families import CASES, base_model, run, typical_cases
from safetensors.torch import save_file
from small import BATCHES, Classifier, cnn, encoder, mlp, trainer, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers


@torch.no_grad()
def move(model):
    """As full fine-tuning does: everything moves."""
    torch.manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))


def tuned_from(base):
    tuned = copy.deepcopy(base)
    move(tuned)
    return tuned


def built(build):
    torch.manual_seed(0)
    return build().eval()


def best(change, groups, rank):
    """The nearest of this rank to each group's matrix, and its relative error."""
    parts = change.double().numpy().reshape(groups, change.shape[0] // groups, -1)
    U, S, V = np.linalg.svd(parts, full_matrices=False)
    near = torch.from_numpy(U[..., :rank] @ (S[:, :rank, None] * V[:, :rank])).reshape(change.shape)
    return near, ((near - change).norm() / change.norm()).item()


def groups_of(layer):
    depthwise = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups == layer.in_channels
    return 1 if depthwise else getattr(layer, "groups", 1)


@typical_cases
def test_every_family_takes_the_nearest_change_and_all_of_it_at_full_rank(name):
    base, whole, tuned = (base_model(name).eval() for _ in range(3))  # some cannot be copied
    move(tuned)
    inputs = CASES[name].inputs()
    told = ll.extract_lora(whole, tuned, energy=1.0)
    assert told.error < 1e-5
    for one, other in zip(run(whole, inputs), run(tuned, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    before = {n: getattr(m, p).detach() for n, m, p in weights_of(whole, base)}
    after = {n: getattr(m, p).detach() for n, m, p in weights_of(whole, tuned)}
    told = ll.extract_lora(base, tuned, rank=1)
    errors = list(told.errors.values())
    for (layer, module, parameter), error in zip(weights_of(whole, base), errors, strict=True):
        near, lost = best(after[layer] - before[layer], groups_of(module), 1)
        made = module.read(parameter).detach().double() - before[layer].double()
        torch.testing.assert_close(made, near, rtol=1e-4, atol=1e-5)
        assert error == pytest.approx(lost, rel=1e-3, abs=1e-6)


def weights_of(adapted, model):
    """The weights that are adapted in one model, in another: name, module, parameter."""
    return [
        (
            f"{n}.{p.slot}",
            model.get_submodule(n),
            layer.lora["default"][p.slot.replace(".", "_") or "weight"].slot.parameter,
        )
        for p in adapted.lora_state.plan.layers
        for n, layer in [(p.module, adapted.get_submodule(p.module))]
    ]


@pytest.mark.parametrize("build", [mlp, cnn, vit, encoder])
def test_all_that_differs_is_kept_saved_loaded_and_merged(build, tmp_path):
    base, x = built(build), BATCHES[build]()
    plain, tuned = copy.deepcopy(base), tuned_from(base)
    y, before = tuned(x), base(x)
    told = ll.extract_lora(base, tuned, energy=1.0, adapter="full")
    assert ll.adapter_names(base) == ["full"]
    torch.testing.assert_close(base(x), y, rtol=1e-5, atol=1e-5)
    with ll.adapters_off(base):
        torch.testing.assert_close(base(x), before, rtol=1e-5, atol=1e-5)
    assert all(
        torch.equal(plain.state_dict()[n], t) for n, t in base.state_dict().items() if n in frozen(base)
    )
    ll.save_adapter(base, tmp_path)
    fresh = copy.deepcopy(plain)
    ll.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), y, rtol=1e-5, atol=1e-5)
    assert ll.plan(copy.deepcopy(plain), base.lora_state.config) == base.lora_state.plan
    held = Classifier(copy.deepcopy(plain))  # the network a level down
    ll.load_adapter(held, tmp_path)
    torch.testing.assert_close(held.eval()(x), y, rtol=1e-5, atol=1e-5)
    ll.eject(base, merged=True)
    torch.testing.assert_close(base(x), y, rtol=1e-5, atol=1e-5)
    assert told.parameters == sum(p.parameters for p in fresh.lora_state.plan.layers)


def frozen(model):
    return [n for n, p in model.named_parameters() if not p.requires_grad and ".lora." not in n]


def test_what_did_not_change_is_left_out():
    base = built(vit)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.blocks[0].attn.qkv.weight.add_(torch.randn(72, 2) @ torch.randn(2, 24))
        tuned.blocks[1].mlp.fc1.bias.add_(1)
        tuned.pos_embed.add_(1)
    told = ll.extract_lora(base, tuned, energy=1.0)
    planned = base.lora_state.plan
    assert (
        [(p.name, p.rank) for p in planned.layers]
        == [("blocks.0.attn.qkv", 2)]
        == [(layer.name, layer.rank) for layer in told.layers]
    )
    assert planned.heads == ["pos_embed"] and base.lora_state.config.train_norm == "frozen"
    assert base.lora_state.config.train_bias == "all"  # of a layer that is not adapted
    assert list(lora_layers(base)) == ["blocks.0.attn.qkv"]
    assert "kept whole: pos_embed" in str(told) and "as the base has them: 8 layers" in str(told)
    x = BATCHES[vit]()
    torch.testing.assert_close(base(x), tuned(x), rtol=1e-5, atol=1e-5)


def test_a_rank_a_layer_by_energy():
    base = built(vit)
    tuned = tuned_from(base)
    told = ll.extract_lora(base, tuned, energy=0.9)
    assert len({layer.rank for layer in told.layers}) > 1
    assert max(told.errors.values()) ** 2 < 0.1 and told.error**2 < 0.1
    smaller = copy.deepcopy(base)
    ll.shrink(smaller, budget=told.parameters // 2)
    assert smaller.lora_state.plan.trainable < base.lora_state.plan.trainable


@pytest.mark.parametrize("build", [cnn, vit])
def test_a_head_of_another_number_of_classes(build, tmp_path):
    base, x = built(build), BATCHES[build]()
    head = "9" if build is cnn else "head"
    tuned = copy.deepcopy(base)
    setattr(tuned, head, nn.Linear(base.get_submodule(head).in_features, 7))
    tuned = tuned_from(tuned)
    told = ll.extract_lora(base, tuned, energy=1.0)
    torch.testing.assert_close(base(x), tuned(x), rtol=1e-5, atol=1e-5)
    assert base.get_submodule(head).out_features == 7
    assert f"{head}.weight: 3 rows in the base, 7 now" in str(told)
    with ll.adapters_off(base):
        assert not base(x).any()
    ll.save_adapter(base, tmp_path)
    fresh = built(build)
    setattr(fresh, head, nn.Linear(tuned.get_submodule(head).in_features, 7))
    ll.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), tuned(x), rtol=1e-5, atol=1e-5)


def files(tuned, folder):
    """The same weights in every form in which they are found."""
    state = {n: t.contiguous() for n, t in tuned.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    torch.save(state, folder / "plain.pt")
    torch.save({"model": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, folder / "ddp.pth")
    module = Classifier(tuned)
    module.criterion = nn.Linear(2, 2)
    run = trainer(folder, max_steps=1)
    run.strategy.connect(module)
    run.save_checkpoint(folder / "last.ckpt", weights_only=True)
    (folder / "parts").mkdir()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({n: state[n] for n in held}, folder / "parts" / file)
    index = {"weight_map": {n: file for file, held in halves.items() for n in held}}
    (folder / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder, *(folder / n for n in ("model.safetensors", "plain.pt", "ddp.pth", "last.ckpt", "parts"))]


def test_every_form_of_a_fine_tuned_model(tmp_path):
    base, x = built(mlp), BATCHES[mlp]()
    tuned = tuned_from(base)
    y = tuned(x)
    state = {f"_orig_mod.{n}": t for n, t in tuned.state_dict().items()}
    for form in [tuned, tuned.state_dict(), Classifier(tuned), state, *files(tuned, tmp_path)]:
        model = copy.deepcopy(base)
        told = ll.extract_lora(model, form, energy=1.0)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    module = Classifier(copy.deepcopy(base))
    ll.extract_lora(module, tuned, rank=2)
    assert module.lora_state.plan.layers[0].name == "model.0"
    told = ll.extract_lora(copy.deepcopy(base), tmp_path / "last.ckpt", rank=2)
    assert "beside the network, left out: criterion" in str(told)


@pytest.mark.slow
def test_compiled_models():
    base, x = built(mlp), BATCHES[mlp]()
    tuned = tuned_from(base)
    y = tuned(x)
    for one, other in ((base, torch.compile(tuned)), (torch.compile(copy.deepcopy(base)), tuned)):
        ll.extract_lora(one, other, energy=1.0)
        torch.testing.assert_close(one(x), y, rtol=1e-5, atol=1e-5)
    nested = nn.Sequential(torch.compile(built(mlp)), nn.Identity())
    ll.extract_lora(nested, nn.Sequential(tuned, nn.Identity()), energy=1.0)
    torch.testing.assert_close(nested(x), y, rtol=1e-5, atol=1e-5)


def test_half_precision_moves_nothing_by_its_rounding():
    base = built(mlp)
    tuned = copy.deepcopy(base).bfloat16()
    with torch.no_grad():
        tuned[0].weight.add_(0.5)
    told = ll.extract_lora(base, tuned, energy=1.0)
    assert [(layer.name, layer.rank) for layer in told.layers] == [("0", 1)] or told.layers[0].error < 0.1
    assert base.lora_state.plan.heads == [] and base.lora_state.config.train_norm == "frozen"


def test_tied_weights_and_a_file_with_one_of_them():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.fc(self.embed(x)))

    base = built(Tied)
    tuned, x = tuned_from(base), torch.arange(9)
    state = {n: t for n, t in tuned.state_dict().items() if n != "out.weight"}
    y = tuned(x)
    ll.extract_lora(base, state, energy=1.0)
    torch.testing.assert_close(base(x), y, rtol=1e-5, atol=1e-5)


def test_what_lies_outside_the_backbone_is_kept_whole():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.tail = mlp(), nn.Linear(3, 4)

        def forward(self, x):
            return self.tail(self.backbone(x))

    base, x = built(Detector), BATCHES[mlp]()
    tuned = tuned_from(base)
    refused = copy.deepcopy(base)
    refused.tail.requires_grad_(False)
    with pytest.raises(ll.ConfigError, match=r"tail\.weight, tail\.bias differ.*requires_grad"):
        ll.extract_lora(refused, tuned, rank=1)
    ll.extract_lora(base, tuned, energy=1.0)
    assert [p.name for p in base.lora_state.plan.layers] == ["backbone.0", "backbone.3"]
    torch.testing.assert_close(base(x), tuned(x), rtol=1e-5, atol=1e-5)


def test_peft_reads_what_was_extracted(tmp_path):
    peft = pytest.importorskip("peft")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.fc(self.norm(self.conv(x)).mean((2, 3))))

    base, x = built(Network), torch.randn(4, 3, 6, 6)
    plain, tuned = copy.deepcopy(base), tuned_from(base)
    ll.extract_lora(base, tuned, energy=0.95)
    ll.save_adapter(base, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(theirs(x), base(x), rtol=1e-5, atol=1e-5)
    positions = built(vit)
    ll.extract_lora(positions, tuned_from(positions), rank=1)
    with pytest.raises(ll.ConfigError, match="pos_embed is trained outside of any layer that PEFT"):
        ll.save_adapter(positions, tmp_path, format="peft")


def test_what_does_not_fit_is_refused_by_name_and_the_base_is_untouched(tmp_path):
    base = built(vit)
    state = {n: t.clone() for n, t in base.state_dict().items()}
    moved = tuned_from(base).state_dict()
    wider = {**moved, "blocks.0.mlp.fc1.weight": torch.randn(96, 25)}
    other = {n.replace("qkv", "qvk"): t for n, t in moved.items()}
    broken = {**moved, "blocks.0.mlp.fc1.weight": torch.full((96, 24), torch.nan)}
    adapted = built(vit)
    ll.inject(adapted)
    ll.save_adapter(adapted, tmp_path / "adapter")
    torch.save({"state_dict": {"x": nn.Linear}}, tmp_path / "code.ckpt")
    (tmp_path / "empty").mkdir()
    for given, options, says in [
        (moved, {}, "what to keep: give one of rank or energy"),
        (moved, {"rank": 1, "energy": 0.5}, "rank=1 and energy=0.5: give one of rank or energy"),
        (moved, {"energy": 1.5}, "energy=1.5: give a number above 0 and at most 1"),
        (moved, {"rank": 1, "adapter": "a b"}, "identifier"),
        (moved, {"rank": 1, "modules_to_save": ["haed"]}, "Did you mean 'head'"),
        (state, {"rank": 1}, "nothing in it differs from the base"),
        (wider, {"rank": 1}, r"blocks\.0\.mlp\.fc1\.weight is \(96, 25\), in the base \(96, 24\)"),
        (other, {"rank": 1}, r"(?s)it lacks blocks\.0\.attn\.qkv.*no blocks\.0\.attn\.qvk.*Did you mean"),
        (broken, {"rank": 1}, r"fc1 holds NaN"),
        (adapted, {"rank": 1}, "adapted model"),
        (tmp_path / "adapter", {"rank": 1}, "holds an adapter already"),
        (tmp_path / "code.ckpt", {"rank": 1}, "holds code; nothing in it was run"),
        (tmp_path / "empty", {"rank": 1}, "holds none of model.safetensors"),
        (tmp_path / "gone.pt", {"rank": 1}, "does not exist"),
        (3, {"rank": 1}, "give a model, its state dict, or a file"),
    ]:
        with pytest.raises(ll.UserError, match=says):
            ll.extract_lora(base, given, **options)
    assert all(torch.equal(state[n], t) for n, t in base.state_dict().items())
    assert not hasattr(base, "lora_state") and not list(lora_layers(base))
    with pytest.raises(ll.ConfigError, match="adapted already"):
        ll.extract_lora(adapted, moved, rank=1)
    ll.quantize(base, "int8")
    with pytest.raises(ll.ConfigError, match="quantized"):
        ll.extract_lora(base, moved, rank=1)


def test_parts_of_a_model_that_are_not_all_there(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    for weight_map, says in [
        ({"a": "a.bin", "b": "a.bin"}, "lacks b"),
        ({"a": "../a.bin"}, "does not say which file"),
        ({"a": "c.bin"}, "c.bin does not exist"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ll.AdapterFileError, match=says):
            ll.extract_lora(built(mlp), tmp_path, rank=1)
