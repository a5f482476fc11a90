"""The commands that make an adapter of fine-tuned weights, and a smaller one of an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_lightning as ll
from lora_lightning.app.cli import main
from lora_lightning.app.inspect import inspect
from lora_lightning.files.locate import read_source
from lora_lightning.files.random_base import keep_base
from lora_lightning.files.weights import write_weights
from lora_lightning.models.timm import timm_model

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"
TASK = {"_target_": "lora_lightning.tasks.classification.ImageClassifier"}
X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm_model(NAME, num_classes=3, **VIT).eval()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, message = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "Traceback" not in message
    return message


@torch.no_grad()
def adapter(folder: Path, **options: Any) -> nn.Module:
    model = network()
    ll.inject(model, ll.LoRAConfig(**{"rank": 4, "train_norm": "affine", **options}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    ll.save_adapter(model, folder, origin={"facts": {"class_names": ["a", "b", "c"]}})
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"fc1": 2}}, {"init": "pissa"}])
@pytest.mark.parametrize("limit", ["energy=0.8", "rank=1", "budget=300"])
def test_a_folder_is_shrunk_as_its_model_would_be(
    limit: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapter(tmp_path / "large", **options)
    keep_base(network(), tmp_path / "large")
    main(["shrink", f"adapter={tmp_path / 'large'}", f"out={tmp_path / 'small'}", limit])
    said = capsys.readouterr().out
    name, _, value = limit.partition("=")
    told = ll.shrink(model, **{name: float(value) if name == "energy" else int(value)})
    assert said.startswith(f"{told}\n") and f"{told.parameters:,} parameters" in said
    fresh = network()
    ll.load_adapter(fresh, tmp_path / "small")
    torch.testing.assert_close(fresh(X), model(X), rtol=1e-5, atol=1e-5)
    assert fresh.lora_state.plan == model.lora_state.plan
    assert fresh.lora_state.plan.trainable == model.lora_state.plan.trainable
    assert fresh.lora_state.plan.total == model.lora_state.plan.total
    planned = ll.plan(network(), fresh.lora_state.config)
    assert planned == fresh.lora_state.plan
    saved = read_source(tmp_path / "small")
    assert saved.saved.origin.facts["class_names"] == ["a", "b", "c"]
    assert (tmp_path / "small" / "base.safetensors").is_file()  # random weights, which nothing else gives
    assert "stable rank" in inspect(tmp_path / "small")


def test_what_cannot_be_shrunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapter(tmp_path / "one")
    adapter(tmp_path / "dora", use_dora=True)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    ll.inject(plain, ll.LoRAConfig(rank=1))
    ll.save_adapter(plain, tmp_path / "peft", format="peft")
    save_file(network().state_dict(), tmp_path / "model.safetensors")
    out = f"out={tmp_path / 'out'}"
    for words, says in [
        ([f"adapter={tmp_path / 'one'}", f"out={tmp_path / 'one'}"], "give one of rank, energy or budget"),
        ([f"adapter={tmp_path / 'one'}", f"out={tmp_path / 'one'}", "rank=1"], "is not empty"),
        ([f"adapter={tmp_path / 'dora'}", out, "rank=1"], "use_dora=True"),
        ([f"adapter={tmp_path / 'peft'}", out, "rank=1"], "in PEFT's format"),
        ([f"adapter={tmp_path / 'model.safetensors'}", out, "rank=1"], "and no adapter"),
    ]:
        assert says in refused(["shrink", *words], capsys)
    assert not (tmp_path / "out").exists()
    main(["shrink", f"adapter={tmp_path / 'one'}", f"out={tmp_path / 'one'}", "rank=1", "overwrite=true"])
    ll.shrink(model, rank=1)
    fresh = network()
    ll.load_adapter(fresh, tmp_path / "one")
    torch.testing.assert_close(fresh(X), model(X), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def tuned(folder: Path, **model: Any) -> nn.Module:
    """Weights of a full fine-tuning, in a file that says how its model is built."""
    network_ = network()
    save_file(network_.state_dict(), folder / "base.safetensors")
    for parameter in network_.parameters():
        parameter.add_(0.1 * torch.rand_like(parameter))
    config = {
        "_target_": "lora_lightning.models.timm.timm_model",
        "name": NAME,
        "pretrained": False,
        **VIT,
        **model,
    }
    origin = {"config": {"model": config, "task": TASK}, "facts": {"num_classes": 3}, "recipe": "vit_digits"}
    write_weights(folder / "model.safetensors", network_.state_dict(), {"origin": origin})
    return network_


def test_fine_tuned_weights_become_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights").mkdir()
    folder = tmp_path / "weights"
    y = tuned(folder, checkpoint=str(folder / "base.safetensors"))(X)
    words = ["extract", f"tuned={folder / 'model.safetensors'}", f"out={tmp_path / 'out'}"]
    main([*words, "energy=1"])
    said = capsys.readouterr().out
    assert "error %" in said and "kept whole: head" in said and "parameters of 9 updates" in said
    fresh = network()
    ll.load_adapter(fresh, tmp_path / "out")
    torch.testing.assert_close(fresh(X), y, rtol=1e-4, atol=1e-4)
    saved = read_source(tmp_path / "out").saved
    assert saved.origin.recipe == "vit_digits" and saved.origin.facts == {"num_classes": 3}
    assert "is not empty" in refused([*words, "energy=1"], capsys)
    main([*words, "rank=2", "overwrite=true"])
    assert {p.rank for p in read_source(tmp_path / "out").saved.plan.layers} == {2}


def test_a_base_that_is_named_or_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    y = tuned(tmp_path)(X)
    words = ["extract", f"tuned={tmp_path / 'model.safetensors'}", f"out={tmp_path / 'out'}", "energy=1"]
    assert "began with random weights" in refused(words, capsys)
    main([*words, f"base={tmp_path / 'base.safetensors'}"])
    fresh = network()
    ll.load_adapter(fresh, tmp_path / "out")
    torch.testing.assert_close(fresh(X), y, rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(network())
    other.head = nn.Linear(24, 7)  # as it was pretrained: a head of other classes
    save_file(other.state_dict(), tmp_path / "seven.safetensors")
    main([*words, f"base={tmp_path / 'seven.safetensors'}", "overwrite=true"])
    ll.load_adapter(fresh := network(), tmp_path / "out")
    torch.testing.assert_close(fresh(X), y, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_extracted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(tmp_path)
    adapter(tmp_path / "adapter")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    file, base, out = (
        f"{n}={tmp_path / f}"
        for n, f in (("tuned", "model.safetensors"), ("base", "other.safetensors"), ("out", "out"))
    )
    for words, says in [
        ([file, out], "give one of rank or energy"),
        ([f"tuned={tmp_path / 'adapter'}", out, "rank=1"], "holds an adapter already"),
        ([file, out, "rank=1", "model.nmae=x"], "there is no such option"),
        ([f"tuned={tmp_path / 'other.safetensors'}", out, "rank=1"], "give recipe=NAME"),
        ([file, out, "rank=1", base], "does not fit the base"),
    ]:
        assert says in refused(["extract", *words], capsys)
    assert not (tmp_path / "out").exists()
