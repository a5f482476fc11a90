"""The recipes of one's own pictures, from a folder of drawn photographs and a model in a local file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

from lora_lightning.app.application import main
from lora_lightning.models.timm import timm_model
from tests.data.drawn import folders

SMALL = {"img_size": 24, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Forty photographs of two classes, one of them damaged, and a small ViT saved on disk."""
    folders(tmp_path / "photos", {"disc": 20, "square": 20})
    damaged = tmp_path / "photos" / "disc" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    base = timm_model("vit_small_patch16_224", num_classes=1000, **SMALL)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model = [f"model.{name}={value}" for name, value in SMALL.items()]
    return [
        "recipe=my_photos", "model.name=vit_small_patch16_224", "model.checkpoint=base.safetensors", *model,
        "data.root=photos", "data.num_workers=0", "trainer=cpu", "trainer.max_epochs=1", "hydra.run.dir=run",
    ]  # fmt: skip


def test_a_folder_of_photographs(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    told = capsys.readouterr().err
    assert "truncated picture" in told and "disc/3.png" in told and "data.strict=false" in told
    assert "Traceback" not in told
    main([*words, "data.strict=false", "data/augment=strong", "data.augment.mixup=0.2"])
    out = capsys.readouterr().out
    assert "photos: 2 classes (disc, square); pictures: train 31, val 4, test 4." in out
    results = {r["method"]: r for r in json.loads((tmp_path / "run" / "results.json").read_text())}
    assert 0 < results["lora"]["trained"] < results["lora"]["total"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"]["augment"]["mixup"] == 0.2 and config["data"]["augment"]["random_erasing"] == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("target", ["classes", "number"])
def test_a_table_of_photographs(words: list[str], tmp_path: Path, target: str) -> None:
    labels = {"classes": lambda n: ("round|dark", "round", "dark", "")[n % 4], "number": lambda n: n / 4}
    rows = [f"photos/square/{n}.png,{labels[target](n)}" for n in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
    main([*words, "data.root=null", "data.table=t.csv", f"data.target={target}", "method=linear_probe"])
    (result,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["method"] == "linear_probe"


@pytest.mark.parametrize(
    "recipe",
    [
        "my_photos",
        pytest.param("vit_imagefolder", marks=pytest.mark.slow),
        pytest.param("cnn_imagefolder", marks=pytest.mark.slow),
    ],
)
def test_all_that_is_missing_is_named_at_once(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit) as caught:
        main([f"recipe={recipe}", "data.root=photo", "logger=none", "trainer=cpu"])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    for words in ("data.root=", "Did you mean 'photos'", "model.checkpoint=", "pretrained weights"):
        assert words in message
    assert "Traceback" not in message
