"""timm_model: names, options, checkpoints that fit or not, the head, the hub's cache, offline."""

from __future__ import annotations

import shlex
import socket
import time
from pathlib import Path

import huggingface_hub as hub
import pytest
import torch
from safetensors.torch import save_file

from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError
from lora_lightning.models.timm import timm_model

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAME = "test_vit"


def tiny(**kwargs):
    return timm_model(NAME, **{**VIT, **kwargs})


def save(model, path: Path, prefix: str = "") -> str:
    save_file({f"{prefix}{k}": v.contiguous() for k, v in model.state_dict().items()}, path)
    return str(path)


@pytest.fixture
def base(tmp_path):
    """A model with 5 classes and its file."""
    torch.manual_seed(0)
    model = tiny(num_classes=5)
    return model, save(model, tmp_path / "base.safetensors")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def no_network(monkeypatch):
    """A machine whose name lookups fail, as offline ones do."""
    calls = []

    def fail(host, *args, **kwargs):
        calls.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return calls


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache: Path, repo: str, model) -> Path:
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save(model, snapshot / "model.safetensors")
    return snapshot / "model.safetensors"


def test_builds_with_options_and_classes():
    model = tiny(num_classes=7)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert tiny(num_classes=0)(torch.zeros(2, 3, 32, 32)).shape == (2, 24)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_checkpoint_is_loaded_whole_with_its_own_head(base, tmp_path, prefix):
    model, _ = base
    path = save(model, tmp_path / "saved.safetensors", prefix)
    loaded = tiny(checkpoint=path)
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.num_classes == 5


def test_lightning_module_file_may_hold_more_than_the_model(base, tmp_path):
    model, _ = base
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    path = tmp_path / "module.safetensors"
    save_file({**state, "val_accuracy.tp": torch.zeros(3)}, path)
    assert same(tiny(checkpoint=str(path)).state_dict(), model.state_dict())


@pytest.mark.parametrize("classes", [3, 0])
def test_head_of_another_size_is_replaced(base, classes):
    model, path = base
    loaded = tiny(checkpoint=path, num_classes=classes).state_dict()
    assert ("head.weight" in loaded) == (classes > 0)
    assert classes == 0 or loaded["head.weight"].shape == (classes, 24)
    assert classes == 0 or not (loaded["head.weight"].any() or loaded["head.bias"].any())
    body = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    assert same({k: v for k, v in loaded.items() if not k.startswith("head.")}, body)


def test_every_head_of_a_distilled_model_is_replaced(tmp_path):
    options = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    name = "deit_tiny_distilled_patch16_224"
    path = save(timm_model(name, num_classes=5, **options), tmp_path / "d.safetensors")
    model = timm_model(name, checkpoint=path, num_classes=3, **options)
    assert model.head.out_features == model.head_dist.out_features == 3
    assert not model.head.weight.any() and not model.head_dist.weight.any()


def test_convolutional_model_with_a_file_that_lacks_step_counters(tmp_path):
    model = timm_model("test_resnet", num_classes=4)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "r.safetensors")
    loaded = timm_model("test_resnet", checkpoint=str(tmp_path / "r.safetensors"), num_classes=4)
    assert same(loaded.state_dict(), model.state_dict())


def test_file_without_a_head(base, tmp_path):
    model, _ = base
    body = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    path = tmp_path / "body.safetensors"
    save_file(body, path)
    assert same(tiny(checkpoint=str(path)).state_dict(), body)
    assert tiny(checkpoint=str(path), num_classes=3).head.out_features == 3


def test_file_of_another_architecture(tmp_path):
    path = save(timm_model("test_resnet", num_classes=5), tmp_path / "resnet.safetensors")
    with pytest.raises(AdapterFileError, match="does not fit test_vit") as error:
        tiny(checkpoint=path)
    assert len(str(error.value)) < 1000


def test_shipped_weights_by_bare_name(base, tmp_path, monkeypatch):
    model, _ = base
    (tmp_path / "weights").mkdir()
    save(model, tmp_path / "weights" / "vit_small.safetensors")
    monkeypatch.setattr("lora_lightning.models.base_file.SHIPPED", tmp_path / "weights")
    assert same(tiny(checkpoint="vit_small").state_dict(), model.state_dict())
    with pytest.raises(MissingFileError, match=r"no such weights.*Did you mean 'vit_small'\?"):
        tiny(checkpoint="vit_smal")


def test_what_does_not_fit_is_named_and_nothing_is_loaded(base, tmp_path):
    state = dict(base[0].state_dict())
    state["blocks.0.attn.qvk.weight"] = state.pop("blocks.0.attn.qkv.weight")
    state["norm.weight"] = torch.zeros(3)
    state["norm.bias"] = state["norm.bias"].long()
    path = tmp_path / "wrong.safetensors"
    save_file(state, path)
    with pytest.raises(AdapterFileError) as error:
        tiny(checkpoint=str(path))
    message = str(error.value)
    assert "1 tensor is missing: blocks.0.attn.qkv.weight" in message
    assert "blocks.0.attn.qvk.weight. Did you mean 'blocks.0.attn.qkv.weight'" in message
    assert "norm.weight is (3,) in the file, (24,) in the model" in message
    assert "norm.bias is (24,) int64 in the file" in message


def test_other_architecture_names_a_few_tensors_and_counts_the_rest(base):
    with pytest.raises(AdapterFileError, match=r"blocks\.2\.[\w.]+; .*and 9 more") as error:
        tiny(checkpoint=base[1], depth=3)
    assert len(str(error.value)) < 1000


def test_adapter_file_is_told_apart(base, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 24)}, path)
    with pytest.raises(AdapterFileError, match="load_adapter"):
        tiny(checkpoint=str(path), num_classes=5)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda good: b"", "is empty"),
        (lambda good: good[: len(good) // 2], "cut short"),
        (lambda good: b"\x80\x04cos\nsystem\n(S'x'\ntR." * 10, "not a safetensors"),
    ],
    ids=["empty", "truncated", "foreign"],
)
def test_damaged_files(base, tmp_path, content, match):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content(Path(base[1]).read_bytes()))
    with pytest.raises(AdapterFileError, match=match) as error:
        tiny(checkpoint=str(path))
    assert str(path) in str(error.value)


def test_missing_file_names_its_neighbour(base):
    with pytest.raises(MissingFileError, match=r"there is no file.*Did you mean 'base.safetensors'"):
        tiny(checkpoint=base[1].replace("base.", "bases."))


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".ckpt"])
def test_pickles_are_refused_unread(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"not read")
    with pytest.raises(AdapterFileError, match="nothing was read"):
        tiny(checkpoint=str(path))


def test_the_conversion_named_in_the_refusal_works(base, tmp_path):
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {f"model.{k}": v for k, v in base[0].state_dict().items()}}, path)
    with pytest.raises(AdapterFileError) as error:
        tiny(checkpoint=str(path))
    command = next(x for x in str(error.value).splitlines() if x.startswith("  python -c"))
    exec(shlex.split(command)[2])
    loaded = tiny(checkpoint=str(path.with_suffix(".safetensors")))
    assert same(loaded.state_dict(), base[0].state_dict())


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("vit_base_patch_224", {}, "Did you mean .*'vit_base_patch16_224'"),
        ("resnet18.a1_in2k", {}, r"no weights tagged 'a1_in2k'\. Did you mean 'a1_in1k'"),
        (3, {}, "name=3"),
        (NAME, {"img_sice": 32}, r"img_sice=32 is not an option.*Did you mean 'img_size'"),
        (NAME, {"num_heads": 5}, "num_heads=5: dim should be divisible"),
        (NAME, {"checkpoint_path": "x.pth"}, "checkpoint=file.safetensors"),
    ],
)
def test_bad_names_and_options(name, options, match):
    with pytest.raises(ConfigError, match=match):
        timm_model(name, **options)


def test_every_problem_at_once():
    with pytest.raises(ConfigError) as error:
        timm_model("resnet81", num_classes=-1, checkpoint="")
    assert len(error.value.problems) == 3


def test_offline_ends_at_once_with_one_message(hub_cache, no_network, caplog):
    start = time.perf_counter()
    with pytest.raises(MissingFileError) as error:
        timm_model("vit_base_patch16_224", pretrained=True, num_classes=10)
    assert time.perf_counter() - start < 5
    assert no_network.count("huggingface.co") <= 2  # a try, not a minute of them
    message = str(error.value)
    repo = "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"
    for part in (
        "Name or service not known",
        f"model.safetensors of {repo}",
        str(hub_cache / f"models--{repo.replace('/', '--')}"),
        f"hf download {repo} model.safetensors",
        "model.checkpoint=weights/model.safetensors",
    ):
        assert part in message
    assert not caplog.records


def test_hub_offline_switch_asks_nobody(hub_cache, no_network, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError, match="HF_HUB_OFFLINE is set"):
        timm_model("resnet18", pretrained=True)
    assert not no_network


def test_a_lookup_that_hangs_is_given_up(hub_cache, monkeypatch):
    monkeypatch.setattr("lora_lightning.utils.download.PROBE_SECONDS", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(2))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(MissingFileError, match=r"no answer within 0\.05 s"):
        timm_model("resnet18", pretrained=True)


@pytest.mark.parametrize("classes", [None, 4])
def test_weights_in_the_cache_are_used_without_a_network(hub_cache, no_network, classes):
    torch.manual_seed(0)
    source = timm_model(NAME)
    put_in_cache(hub_cache, "timm/test_vit.r160_in1k", source)
    model = timm_model(NAME, pretrained=True, num_classes=classes)
    assert not no_network
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    assert model.head.out_features == (classes or 1000)
    assert classes or torch.equal(model.head.weight, source.head.weight)


def test_pretrained_position_embeddings_are_resampled_by_timm(hub_cache, no_network):
    source = timm_model(NAME)
    put_in_cache(hub_cache, "timm/test_vit.r160_in1k", source)
    model = timm_model(NAME, pretrained=True, num_classes=4, img_size=32)
    assert model.pos_embed.shape != source.pos_embed.shape
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_pretrained_weights_that_leave_layers_out_are_refused(hub_cache, no_network):
    put_in_cache(hub_cache, "timm/test_vit.r160_in1k", timm_model(NAME))
    with pytest.raises(AdapterFileError, match=r"cannot be loaded into test_vit"):
        timm_model(NAME, pretrained=True, num_classes=4, depth=9)
    with pytest.raises(ConfigError, match="Did you mean 'depth'"):
        timm_model(NAME, pretrained=True, num_classes=4, deth=9)


def test_damaged_file_in_the_cache(hub_cache, no_network):
    path = put_in_cache(hub_cache, "timm/test_vit.r160_in1k", timm_model(NAME))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AdapterFileError, match="delete it and download it again"):
        timm_model(NAME, pretrained=True)


def test_checkpoint_takes_the_place_of_pretrained(base, hub_cache, no_network):
    loaded = tiny(pretrained=True, checkpoint=base[1])
    assert same(loaded.state_dict(), base[0].state_dict())


def test_weights_with_a_url_alone(no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(MissingFileError, match=r"curl -LO https://github\.com") as error:
        timm_model("gcvit_xxtiny", pretrained=True)
    assert str(tmp_path / "checkpoints" / "gcvit_xxtiny") in str(error.value)


def test_model_without_pretrained_weights_names_some_that_have(no_network):
    with pytest.raises(ConfigError, match=r"no weights.*Did you mean .*'efficientnet_b5'"):
        timm_model("efficientnet_b6", pretrained=True)
    assert not no_network


@pytest.mark.parametrize("name", ["timm/test_vit", "hf-hub:timm/test_vit", "hf_hub:timm/test_vit.r160_in1k"])
def test_a_name_as_the_hub_has_it(name):
    assert timm_model(name, num_classes=3).num_classes == 3
