"""Adapter files: round trip, other shapes of the same model, damage, and nothing half-done."""

import gc
import json
import os
import tracemalloc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small import BATCHES, Classifier, adapted, cnn, encoder, mlp, vit

import lora_lightning as ll
from lora_lightning.files import pair
from lora_lightning.files.format import read_adapter, write_adapter
from lora_lightning.files.pair import CONFIG_FILE, TENSOR_FILE, read_pair
from lora_lightning.layers.registry import lora_layers


def train_everything(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("build", [mlp, cnn, vit, encoder])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"train_norm": "both", "train_bias": "all"}, {"rank_pattern": {"*": 3}}],
    ids=["plain", "dora", "norms", "ranks"],
)
def test_a_fresh_base_with_the_adapter_gives_the_same_outputs(build, options, tmp_path):
    model = train_everything(adapted(build, **options))
    model.train()(BATCHES[build]())  # moves running statistics where they are not frozen
    ll.save_adapter(model.eval(), tmp_path / "adapter")
    torch.manual_seed(0)
    fresh = build()
    ll.load_adapter(fresh, tmp_path / "adapter")
    x = BATCHES[build]()
    assert torch.equal(fresh.eval()(x), model(x))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again = adapted(build, seed=0, **options)
    ll.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(x), model(x))


def test_the_file_holds_what_was_trained_and_no_more(tmp_path):
    ll.save_adapter(adapted(vit), tmp_path)
    names = set(load_file(tmp_path / TENSOR_FILE))
    layers = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert names == {f"{n}.lora_{k}" for n in layers for k in "AB"} | {"head.weight", "head.bias"}
    about = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert about["config"]["rank"] == 2
    assert [p["name"] for p in about["plan"]["layers"]] == layers


def test_an_adapter_of_a_lightning_module_loads_into_the_bare_network_and_back(tmp_path):
    module = adapted(lambda: Classifier(vit()))
    ll.save_adapter(module, tmp_path / "outer")
    torch.manual_seed(0)
    bare = vit()
    ll.load_adapter(bare, tmp_path / "outer")
    x = BATCHES[vit]()
    assert torch.equal(bare.eval()(x), module.eval()(x))
    ll.save_adapter(bare, tmp_path / "inner")
    torch.manual_seed(0)
    outer = Classifier(vit())
    ll.load_adapter(outer, tmp_path / "inner")
    assert torch.equal(outer.eval()(x), module(x))


def test_another_model_or_other_ranks_are_refused_before_anything_changes(tmp_path):
    import timm

    ll.save_adapter(adapted(vit), tmp_path)
    wider = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=3
    )
    other_head = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=7
    )
    cases = [
        (wider, "blocks.0.attn.qkv: weight .144, 48., in the file .72, 24."),
        (cnn(), "no layer blocks.0.attn.qkv"),
        (other_head, "head.weight: .7, 24. in the model, .3, 24. in the file"),
    ]
    for model, says in cases:
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(ll.AdapterFileError, match=says):
            ll.load_adapter(model, tmp_path)
        assert not lora_layers(model)
        assert all(p.requires_grad for p in model.parameters())
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    for options, says in [
        ({"rank": 4}, "rank 4 in the model, 2 in the file"),
        ({"rank": 2, "alpha": 1}, "alpha 1 in the model, 4 in the file"),
        ({"rank": 2, "alpha": 4, "use_rslora": True}, "use_rslora: True in the model, False in the file"),
        ({"rank": 2, "target_modules": ["qkv"]}, "is not adapted in the model"),
    ]:
        model = vit()
        ll.inject(model, ll.LoRAConfig(**options))
        with pytest.raises(ll.AdapterFileError, match=says):
            ll.load_adapter(model, tmp_path)


def damaged(tmp_path):
    """(file, how it is damaged, what is said)"""
    tensors, config = tmp_path / TENSOR_FILE, tmp_path / CONFIG_FILE
    whole, about = tensors.read_bytes(), json.loads(config.read_text())
    yield tensors, b"", "cut short or not a safetensors"
    yield tensors, whole[:100], "cut short or not a safetensors"
    yield tensors, whole[:-10], "cut short or not a safetensors"
    yield tensors, b"PK\x03\x04" + whole[4:], "cut short or not a safetensors"
    yield tensors, whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "do not match their checksum"
    yield config, b"", "damaged"
    yield config, b"[1, 2", "damaged"
    yield config, b"\xff\xfe\x00", "damaged"
    yield config, b"{}", "not an adapter of lora_lightning"
    yield config, b'{"peft_type": "LORA"}', "PEFT adapter|checksum"
    yield config, json.dumps({**about, "version": 99}).encode(), "version 99.*Upgrade"
    yield config, json.dumps({**about, "plan": 3}).encode(), "damaged"
    yield config, json.dumps({**about, "config": {"rank": 0}}).encode(), "edited by hand"
    yield config, json.dumps({**about, "sha256": "0"}).encode(), "two different saves"


def test_damaged_files_are_refused_and_the_model_is_untouched(tmp_path):
    ll.save_adapter(adapted(vit), tmp_path)
    torch.manual_seed(0)
    model = vit()
    for file, content, says in list(damaged(tmp_path)):
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ll.AdapterFileError, match=says):
            ll.load_adapter(model, tmp_path)
        assert not lora_layers(model)
        file.write_bytes(whole)
    ll.load_adapter(model, tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ll.AdapterFileError, match=CONFIG_FILE):
        ll.load_adapter(vit(), tmp_path / "nowhere")


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    ll.save_adapter(adapted(mlp), tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_lightning.files.pair.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        ll.save_adapter(adapted(mlp, seed=1), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_files_are_readable_as_the_umask_allows(tmp_path):
    mask = os.umask(0o022)
    try:
        ll.save_adapter(adapted(mlp), tmp_path)
    finally:
        os.umask(mask)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}


def test_a_tensor_too_many_or_too_few_is_named(tmp_path):
    ll.save_adapter(adapted(mlp), tmp_path)
    saved = read_adapter(tmp_path)
    some = dict(list(saved.tensors.items())[1:]) | {"extra": torch.zeros(1)}
    write_adapter(tmp_path, replace(saved, tensors=some))
    with pytest.raises(ll.AdapterFileError, match="is missing in the file; extra has no place"):
        ll.load_adapter(mlp(), tmp_path)


def test_reading_again_and_again_holds_no_more_memory(tmp_path):
    """As a server does: safetensors' `get_tensor` leaks two numbers of each tensor."""
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2))
    ll.save_adapter(model, tmp_path / "mine")
    for _ in range(3):
        read_pair(tmp_path / "mine")
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    for _ in range(100):
        read_pair(tmp_path / "mine")
    gc.collect()
    after = tracemalloc.take_snapshot()
    tracemalloc.stop()
    of_pair = [d for d in after.compare_to(before, "filename") if d.traceback[0].filename == pair.__file__]
    assert sum(d.size_diff for d in of_pair) < 2000
