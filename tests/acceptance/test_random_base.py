"""LoRA over a base that was never trained: a loud warning, and a run that can be used again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import Classifier, cnn, encoder, loader, mlp, pretrained, trainer, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.app import cli
from lora_lightning.app.application import main
from lora_lightning.app.compose import recipe_config
from lora_lightning.app.rebuild import rebuilt_model
from lora_lightning.errors import AdapterFileError
from lora_lightning.files.locate import read_source
from lora_lightning.files.random_base import BASE_FILE, is_random, looks_untrained, put_back_base
from lora_lightning.models.detection import detector
from lora_lightning.models.timm import timm_model

QUICK = ["debug=fast", "trainer.enable_progress_bar=false", "logger=none", "lora.rank=2", "hydra.run.dir=run"]


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("recipe", ["vit_digits", pytest.param("resnet_digits", marks=pytest.mark.slow)])
def test_a_run_keeps_what_its_adapter_is_added_to(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"recipe={recipe}", "model.checkpoint=null", *QUICK]
    main(words)
    said = capsys.readouterr().out
    assert said.index("WARNING: LoRA is added to random weights") < said.index("method")
    assert f"kept in run/{BASE_FILE}" in said and f"{BASE_FILE} " in said[said.index("In run:") :]
    base = load_file(f"run/{BASE_FILE}")

    torch.manual_seed(99)  # nothing depends on the generators of here
    cli.main(["merge", "ckpt=run/adapter", "out=merged.safetensors"])
    cli.main(["merge", "ckpt=run/checkpoints/best.ckpt", "out=best.safetensors"])
    merged = load_file("merged.safetensors")
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[n], base[n]) for n in base)

    source = read_source("run/adapter")
    model, _ = rebuilt_model(source.config(), source)
    ll.load_adapter(model, "run/adapter")
    ll.eject(model, merged=True)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, merged[name], atol=1e-6), name


@pytest.mark.slow
def test_it_goes_on_with_the_weights_that_were_kept(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipe=vit_digits", "model.checkpoint=null", *QUICK])
    base = load_file(f"run/{BASE_FILE}")
    capsys.readouterr()
    main(["resume=run", "trainer.max_epochs=2"])
    assert "WARNING: LoRA" in capsys.readouterr().out
    assert all(torch.equal(t, base[n]) for n, t in load_file(f"run/{BASE_FILE}").items())
    cli.main(["merge", "ckpt=run/checkpoints/last.ckpt", "out=merged.safetensors"])
    main(["recipe=vit_digits", *QUICK])  # the shipped weights: nothing has to be kept
    assert "WARNING" not in capsys.readouterr().out
    assert not Path("run", BASE_FILE).exists()


@pytest.mark.slow
def test_pictures_of_a_run_over_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipe=fcos_shapes", "model.checkpoint=null", "data.train_size=8", "data.val_size=4",
          "data.test_size=4", *QUICK])  # fmt: skip
    cli.main(["predict", "adapter=run/adapter", "out=found"])
    assert Path("found/predictions.json").is_file()


def test_what_looks_untrained() -> None:
    assert all(looks_untrained(build()) for build in (cnn, mlp, vit, encoder))
    assert not looks_untrained(nn.Sequential(nn.Linear(3, 3)))  # nothing to tell by
    assert not looks_untrained(timm_model("vit_tiny_patch16_224", checkpoint="vit_digits",
        **{k: v for k, v in recipe_config("vit_digits")["model"].items() if k not in
           ("_target_", "name", "checkpoint", "pretrained")}))  # fmt: skip
    assert not looks_untrained(detector("fcos_small", 4, checkpoint="fcos_shapes"))


@pytest.mark.parametrize(
    ("node", "random"),
    [
        ({"_target_": "lora_lightning.models.detection.detector", "pretrained": False}, True),
        ({"_target_": "lora_lightning.models.detection.detector", "pretrained": True}, False),
        (
            {"_target_": "lora_lightning.models.timm.timm_model", "pretrained": False, "checkpoint": "x"},
            False,
        ),
        ({"_target_": "photos.Net", "pretrained": False}, False),
        ({"_target_": "lora_lightning.models.whisper.whisper", "checkpoint": None}, False),
    ],
)
def test_what_the_configuration_says(node: dict[str, object], random: bool) -> None:
    trained = nn.Sequential(nn.LayerNorm(3))
    nn.init.normal_(trained[0].weight)
    assert is_random(node, trained) == random
    assert is_random({k: v for k, v in node.items() if k == "_target_"}, nn.Sequential(nn.LayerNorm(3)))


def test_in_a_trainer_it_is_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def warned(module: Classifier) -> bool:
        recwarn.clear()
        trainer(tmp_path, ll.LoRACallback(rank=2), max_steps=1).fit(module, loader())
        return any("look random" in str(w.message) for w in recwarn)

    assert warned(Classifier())
    network = copy.deepcopy(pretrained(cnn))
    network[1].running_mean.normal_()
    assert not warned(Classifier(network))


def test_a_kept_base_of_another_model_is_one_message(tmp_path: Path) -> None:
    from lora_lightning.files.random_base import keep_base

    keep_base(mlp(), tmp_path)
    with pytest.raises(AdapterFileError, match=r"base\.safetensors does not fit the model"):
        put_back_base(cnn(), [tmp_path])
    (tmp_path / BASE_FILE).write_bytes(b"x")
    with pytest.raises(AdapterFileError):
        put_back_base(mlp(), [tmp_path])


@pytest.mark.parametrize("method", ["full", "none"])
def test_random_weights_are_told_where_nothing_is_added_to_them(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [f"method={method}", "debug=fast", "compare=[]", "hydra.run.dir=run"]
    main(["model.checkpoint=null", *words])
    assert "WARNING: the model begins with random weights, in whole or in part." in capsys.readouterr().out
    main(words)
    assert "WARNING" not in capsys.readouterr().out
